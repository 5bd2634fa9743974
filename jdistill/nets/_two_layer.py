"""The two-layer network of the theory of patches."""

import math

import flax.linen as nn
import jax.numpy as jnp

from jdistill.typing import Array


class TwoLayer(nn.Module):
    """Two-layer network of patches that does not see their last number.

    The logit of class `c` is::

        z_c(x) = Σ_p Σ_m relu(<w_cm, x_p>)^q

    Attributes:
        width: hidden units m for each class.
        num_classes: classes c.
        power: q.
        scale: standard deviation of the initial weights, times the root of a patch's numbers.
    """

    width: int
    num_classes: int = 2
    power: int = 3
    scale: float = 0.1

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits `[B, K]` of inputs `[B, P, D]`."""
        dimension = inputs.shape[-1]
        shape = (dimension - 1, self.num_classes, self.width)
        init = nn.initializers.normal(self.scale / math.sqrt(dimension))
        kernel = self.param("kernel", init, shape)
        hidden = jnp.einsum("bpd,dcm->bpcm", inputs[..., :-1], kernel)
        return jnp.sum(nn.relu(hidden) ** self.power, axis=(1, 3))
