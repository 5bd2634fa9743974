"""`jdistill defend` from a checkout: `python -m experiments.defend mnist`."""

import sys

from jdistill import commands

if __name__ == "__main__":
    commands.main(["defend", *sys.argv[1:]])
