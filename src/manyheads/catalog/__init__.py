"""The 59 systems: what each is, where it lives, whether it works."""
