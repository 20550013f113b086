"""``python -m manyheads``, and ``torchrun -m manyheads``: the command line."""

from manyheads.cli.main import main

if __name__ == "__main__":
    main()
