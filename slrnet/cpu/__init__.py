"""Faster convolutions, losses and crops on CPUs.

The rest of the package holds plain PyTorch. Where a network or a tensor is on a CPU, it asks this package for
replacements: training and prediction call `speed_up`, the cross-entropy `cross_entropy.sums_and_gradients`, the loader
`crop.crop_kernel`. They import this package only then, so processes that work on a GPU never do.
`docs/performance.md` lists what each replacement saves.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["speed_up"]

Model = TypeVar("Model", bound=nn.Module)


def speed_up(model: Model) -> Model:
    """Replaces a network's modules in place by ones that are faster on a CPU, and returns the network.

    Outputs and gradients differ by rounding, about 1e-5 of the largest value. Parameters and buffers stay the same
    objects under the same names, so state dicts and optimizers still fit. A second call changes nothing.
    """
    from slrnet.cpu.depthwise import DepthwiseConv2d  # imported here because readers need no convolutions
    from slrnet.cpu.winograd import WinogradConv2d

    for name, module in list(model.named_modules()):
        for kind in (DepthwiseConv2d, WinogradConv2d):
            if isinstance(module, nn.Conv2d) and kind.serves(module):
                model.set_submodule(name, kind(module))
    return model
