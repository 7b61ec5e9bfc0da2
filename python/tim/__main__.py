"""`python -m tim` is the command `tim`."""

from tim.cli import main

if __name__ == "__main__":
    main()
