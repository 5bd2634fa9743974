"""Thresholds of the checks, and why. Shares are of all examples: points of the naive number."""

# A check says "masked" where at least this share of the naive robust accuracy rests on examples
# that it casts doubt on. On undefended and on adversarially trained networks PGD-40 stays within a
# few points of AutoAttack (RobustBench: 2 to 5; an ordinary MNIST network: 7); masked ones are off
# by 15 to 70 (Croce & Hein 2020, table 2).
GAP = 0.10
# ... and the lower end of the share's 95% interval is at least this, and they are so many, so that
# a handful of examples decides nothing.
GAP_LOW = 0.05
GAP_EXAMPLES = 5
# A gap between two attacks may also be one of strength, where robust accuracy falls steeply with
# eps, or in l1, where PGD is weak (on an adversarially trained MNIST network 67 against 31%). What
# the weaker attack achieves at this multiple of eps is put down to strength; a masked gradient is
# no better there.
LARGER_RADIUS = 2.0
SMALLER_RADIUS = 0.5
# ... and the gap counts where at least this share of it remains at the larger radius.
GAP_REMAINS = 0.5
# With fewer correct examples the gap above is less than two examples.
MIN_CORRECT = 20
# Largest gradient entries below this are lost in toolkits with a floor under the norm (1e-12 in
# AutoAttack and Foolbox, 1e-7 in ART, 1e-6 in CleverHans). This library's attacks have no floor, so
# a tiny gradient is reported and decides nothing; an exact zero does.
TINY_GRADIENT = 1e-12
# Gradient and function disagree where the change predicted and the change seen differ by more than
# this share of the larger one. A smooth or piecewise linear network is within a few percent.
DISAGREEMENT = 0.5
# ... over a step of this share of eps, where a network has hardly left its linear piece, and at
# least this share of the box, where float32 inputs and logits still tell a step.
LOCAL_STEP = 0.01
SHORTEST_STEP = 1e-4
# ... or where a step of eps changes the margin by this many times what the gradient says.
JUMP = 10.0
# Changes below this many units in the last place of the largest logit are rounding.
ROUNDING = 100.0
# Logits of the same input that differ by more than this share of the largest one do not repeat;
# sums in another order differ by far less.
REPEATS = 1e-3
# A loss is still moving where its best value rises by more than this share of its whole rise in the
# last steps (Pintor et al. 2022 take 5% of the last 10), ...
MOVING = 0.05
LAST_STEPS = 10
# ... and the attack is, where it is for more than half of the examples that resisted.
MOVING_SHARE = 0.5
# More effort helps where it breaks this share of all examples after everything else did; lower end
# of the interval as above, scaled alike.
MORE = 0.05
MORE_LOW = 0.02
# In the whole box every example should fall. A few may not, within so few steps.
UNBOUNDED_LEFT = 0.05
