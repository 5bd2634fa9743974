"""The command `jdistill`, as `python -m jdistill`."""

from jdistill.commands import main

if __name__ == "__main__":
    main()
