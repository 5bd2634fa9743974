"""Is a robust accuracy to be believed? The gradient-masking verdict, with its evidence.

`masking` attacks a network the usual way and in every other way that a cheap evaluation can afford,
compares the two on the same examples, and probes what the usual attack had to go by. The verdict's
label says whether the usual attack's number is to be believed; how robust the network is stays a
number, `Verdict.worst_case`, and even that is an upper bound: what no attack found is not proved
absent.
"""

from jdistill.diagnose._masking import masking, masking_of_stack
from jdistill.diagnose._verdict import Attempt, Check, Verdict

__all__ = ["Attempt", "Check", "Verdict", "masking", "masking_of_stack"]
