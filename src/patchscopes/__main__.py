"""python -m patchscopes: the command line."""

from patchscopes.cli import main

if __name__ == "__main__":
    main()
