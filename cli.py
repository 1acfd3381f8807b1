"""`python cli.py` is `tkn-run`."""

from tkn.cli import main

if __name__ == "__main__":
    main()
