"""`python -m fdq.cli`: the `fdq` command where its script is not on the path."""

from fdq.cli import main

if __name__ == "__main__":
    main()
