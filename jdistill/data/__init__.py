"""Data sets as NumPy arrays, and the batches that training and evaluation read.

`load` returns images in [0, 1] with integer labels, split into train, validation and test. Four
sets are known by name (`NAMES`):

* `digits`: scikit-learn's 1,797 images of 8×8 pixels, embedded there: no download, no cache;
* `mnist`, `fashion_mnist`, `cifar10`: read once from a prepared TensorFlow Datasets (TFDS)
  folder, without TensorFlow, and kept as an `.npz` file, so that the second load takes about
  a second, imports no TFDS, and works where the prepared folder is gone. Copying that one file
  into the cache folder of another machine is enough to work there.

Everything here runs on the host in NumPy: these sets fit into memory, so an epoch is a NumPy
permutation and no input pipeline is needed.

Example:
    >>> from jdistill import data
    >>> digits = data.load("digits")
    >>> digits.train.inputs.shape, digits.num_classes
    ((1197, 8, 8, 1), 10)
    >>> order = data.epoch_order([0], epoch=0, num_examples=1197)
    >>> sum(int(b.mask.sum()) for b in data.batches(*digits.train, batch_size=128, order=order))
    1197
"""

from jdistill.data._batches import batches, epoch_order, num_batches
from jdistill.data._load import NAMES, load
from jdistill.data._types import Dataset, Split

__all__ = ["NAMES", "Dataset", "Split", "batches", "epoch_order", "load", "num_batches"]
