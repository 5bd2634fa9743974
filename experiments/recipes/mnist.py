r"""MNIST and Fashion-MNIST with the papers' network, 7 epochs where the papers have 50.

python -m experiments.defend mnist
python -m experiments.defend mnist --epochs 50 --learning-rate 0.01 --learning-rate-power 0 \
    --temperatures 1 2 5 10 20 30 40 50 100

The second command is the recipe as released by Mandal & Gao 2023, for an accelerator.
"""

import dataclasses

from experiments.recipes._recipe import Recipe

MNIST = Recipe(
    dataset="mnist",
    network="mnist_net",
    temperatures=(1.0, 20.0, 100.0),
    epochs=7,
    learning_rate=0.02,
    learning_rate_power=0.5,
)

FASHION_MNIST = dataclasses.replace(MNIST, dataset="fashion_mnist")
