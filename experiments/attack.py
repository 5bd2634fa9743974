"""`jdistill attack` from a checkout: `python -m experiments.attack runs/mnist --attack pgd`."""

import sys

from jdistill import commands

if __name__ == "__main__":
    commands.main(["attack", *sys.argv[1:]])
