"""The settings of an experiment: one frozen dataclass, one instance a data set."""

from experiments.recipes._recipe import Recipe, smoke
from experiments.recipes.cifar10 import CIFAR10
from experiments.recipes.digits import DIGITS
from experiments.recipes.mnist import FASHION_MNIST, MNIST

RECIPES = {recipe.dataset: recipe for recipe in (DIGITS, MNIST, FASHION_MNIST, CIFAR10)}

__all__ = ["CIFAR10", "DIGITS", "FASHION_MNIST", "MNIST", "RECIPES", "Recipe", "smoke"]
