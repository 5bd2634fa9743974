"""Trained networks as files that outlive the versions they were written with.

`save` writes a folder with three files:

* `weights.npz`: every weight under its path in the network, as NumPy's own types, no pickle;
* `config.json`: what the network is (class and fields of the library's own networks), its input
  shape, bounds, and number of classes, the versions it was written with, the checksums of the
  files, and the logits of two fixed inputs;
* `model.stablehlo`: the same network as a program of `jax.export`, for batches of any size on CPU,
  CUDA GPUs, and TPUs.

Weights and configuration are the truth: `load` makes the network from them on any version of JAX.
The program is a convenience for where this library is not: JAX promises to read it within a window
of versions, which `window` says, and `load_stablehlo` refuses it clearly outside of that. Both
compare the checksums, and the logits of the fixed inputs.
"""

from jdistill.export._load import load, load_stablehlo, window
from jdistill.export._save import save

__all__ = ["load", "load_stablehlo", "save", "window"]
