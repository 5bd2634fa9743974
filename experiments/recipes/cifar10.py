"""CIFAR-10 with the papers' network. On CPU a matter of many hours: meant for an accelerator.

python -m experiments.defend cifar10
"""

from experiments.recipes._recipe import Recipe

CIFAR10 = Recipe(
    dataset="cifar10",
    network="cifar_net",
    temperatures=(1.0, 20.0, 100.0),
    epochs=50,
    learning_rate=0.01,
    eps=8 / 255,
)
