"""Networks, and the adapters that turn any network into the library's two callables.

* Networks: `ConvNet`, the papers' sizes `mnist_net` and `cifar_net`, the small `digits_net`;
  `resnet`, `plain_net`, and `wide_resnet` for CIFAR by depth, `resnet18` and `mobilenet_v2`,
  both also for ImageNet's pictures, `EMO` from `emo_1m` to `emo_6m` and the small `emo_small`;
  `ViT`, the transformers of DeiT's sizes `deit_tiny`, `deit_small`, `deit_base`, and the small
  `vit_digits`, `vit_mnist`, `vit_cifar`, all with or without a distillation token; `init` draws
  their variables.
* Normalization, as an argument of the convolutional ones: `batch_norm`, `group_norm`.
* Adapters: `apply_fn`, `nnx_model` (training) and `logits_fn` (attacks and measures) for Flax
  modules, `nnx_logits_fn` for NNX ones, `callable_logits_fn` for everything else; `binary` for a
  network with a single logit; `with_features` for a network that returns outputs of its layers
  too, `outputs_fn` for all that a network returns, `logits_of` for the logits among it;
  `with_temperature` divides the logits of any of them. All are values that compare by what they
  hold, so new weights of an equal network compile nothing.
* Stacks: `stack`, `unstack`, `index` and `stack_size` for pytrees that `jax.vmap` runs side by
  side.
* Fast gradients on CPU: `fast_on_cpu` of any network, which attacks, measures, and training steps
  apply by themselves; `conv_general_dilated` and `max_pool`, drop-in for Flax layers.

This is the only module of the library that imports `flax.linen` or `flax.nnx`.
"""

from jdistill.nets._adapters import (
    apply_fn,
    binary,
    callable_logits_fn,
    logits_fn,
    logits_of,
    nnx_logits_fn,
    nnx_model,
    with_temperature,
)
from jdistill.nets._cifar import PlainNet, ResNet, plain_net, resnet
from jdistill.nets._convnet import ConvNet, cifar_net, digits_net, init, mnist_net
from jdistill.nets._convolution import conv_general_dilated
from jdistill.nets._emo import EMO, emo_1m, emo_2m, emo_5m, emo_6m, emo_small
from jdistill.nets._features import outputs_fn, with_features
from jdistill.nets._mobilenet import MobileNetV2, mobilenet_v2, mobilenet_v2_cifar
from jdistill.nets._normalization import batch_norm, group_norm
from jdistill.nets._pooling import max_pool
from jdistill.nets._residual import (
    ProjectionResNet,
    WideResNet,
    resnet18,
    resnet18_imagenet,
    wide_resnet,
)
from jdistill.nets._rewriting import fast_on_cpu
from jdistill.nets._stacking import index, stack, stack_size, unstack
from jdistill.nets._vit import (
    ViT,
    deit_base,
    deit_small,
    deit_tiny,
    vit_cifar,
    vit_digits,
    vit_mnist,
)

__all__ = [
    "EMO",
    "ConvNet",
    "MobileNetV2",
    "PlainNet",
    "ProjectionResNet",
    "ResNet",
    "ViT",
    "WideResNet",
    "apply_fn",
    "batch_norm",
    "binary",
    "callable_logits_fn",
    "cifar_net",
    "conv_general_dilated",
    "deit_base",
    "deit_small",
    "deit_tiny",
    "digits_net",
    "emo_1m",
    "emo_2m",
    "emo_5m",
    "emo_6m",
    "emo_small",
    "fast_on_cpu",
    "group_norm",
    "index",
    "init",
    "logits_fn",
    "logits_of",
    "max_pool",
    "mnist_net",
    "mobilenet_v2",
    "mobilenet_v2_cifar",
    "nnx_logits_fn",
    "nnx_model",
    "outputs_fn",
    "plain_net",
    "resnet",
    "resnet18",
    "resnet18_imagenet",
    "stack",
    "stack_size",
    "unstack",
    "vit_cifar",
    "vit_digits",
    "vit_mnist",
    "wide_resnet",
    "with_features",
    "with_temperature",
]
