"""``python -m reproduce`` and ``torchrun -m reproduce``: the same as ``w2vrep``."""

from reproduce.cli import main

if __name__ == "__main__":
    main()
