"""`python -m mergelab`: the command line without the installed script."""

from mergelab.cli.main import main

if __name__ == "__main__":
    main()
