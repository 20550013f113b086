"""Every engine against dense SDPA and the best alternative installable here: `make bench`."""
