"""`python -m elmwood` is the elmwood command."""

from elmwood.cli import main

if __name__ == "__main__":
    main()
