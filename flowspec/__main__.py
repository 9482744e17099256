"""`python -m flowspec <command>`."""

from flowspec.cli.main import main

if __name__ == "__main__":
    main()
