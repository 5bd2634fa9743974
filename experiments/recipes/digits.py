"""scikit-learn's digits: the demo, under five minutes on 2 CPU cores.

python -m experiments.defend digits
"""

from experiments.recipes._recipe import Recipe

DIGITS = Recipe(
    dataset="digits",
    network="digits_net",
    temperatures=(1.0, 5.0, 20.0, 50.0, 100.0),
    epochs=30,
    batch_size=32,
    learning_rate=0.05,
    sensitivity_examples=400,
    eps=0.2,
    fgsm_examples=400,
    pgd_examples=100,
    cw_examples=50,
)
