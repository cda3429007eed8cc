"""What makes convolutions, losses and crops fast on CPUs.

The rest of the package holds plain PyTorch and asks this room for replacements where a tensor or a network is on a CPU:
training and prediction call `speed_up`, the cross-entropy `cross_entropy.resized_cross_entropy`, the loader
`crop.crop_kernel`. All of them import this room when they call it, so a process that works on a GPU never does.
`docs/performance.md` has what each replacement is worth.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["speed_up"]

Model = TypeVar("Model", bound=nn.Module)


def speed_up(model: Model) -> Model:
    """Replaces modules of a network by ones that compute the same faster on a CPU.

    Outputs and gradients differ by rounding, about 1e-5 of the largest value. Parameters and buffers stay the same
    objects under the same names, so state dicts and optimizers fit as before. Calling it again changes nothing.

    Args:
        model: the network; its submodules are replaced in place.

    Returns:
        The same network.
    """
    from slrnet.cpu.depthwise import DepthwiseConv2d  # here: readers use this room and need no convolutions
    from slrnet.cpu.winograd import WinogradConv2d

    for name, module in list(model.named_modules()):
        for kind in (DepthwiseConv2d, WinogradConv2d):
            if isinstance(module, nn.Conv2d) and kind.serves(module):
                model.set_submodule(name, kind(module))
    return model
