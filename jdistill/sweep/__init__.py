"""Many runs as one program: every temperature and seed of a study, trained as one stack.

What `distill` and `train` do for one run, with a leading axis `R` of runs (temperature x seed) on
states, keys and losses: the same steps in the same order with the same keys, so each run is the
one that `distill.chain` gives, to float tolerance. The data lies on the device once; an epoch is
one compiled loop. Runs that do not fit the device's memory go in equal chunks; several devices
share the runs between them.
"""

from jdistill.sweep._chain import SweepResult, chain
from jdistill.sweep._fit import fit
from jdistill.sweep._states import create_state

__all__ = ["SweepResult", "chain", "create_state", "fit"]
