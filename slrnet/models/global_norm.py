"""Batch norms that measure the images of all workers, so that any number of workers trains the same network.

A usual batch norm measures its own process's images: eight workers with two images each train another network than one
worker with sixteen. Here all workers add up count, sum and sum of squares, and in the backward pass the two sums of the
gradient, so that outputs, gradients and running statistics are those of the global batch, whatever the workers' shares.
`torch.nn.SyncBatchNorm` computes on GPUs alone and would also wake the norms that stay fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["GlobalBatchNorm2d", "share_batch_norms"]


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose statistics in training are those of the images of all processes of torch's process group.

    All processes must call it equally often, each with one image or more. In evaluation mode it is the usual one.
    Parameters and buffers have the names of `nn.BatchNorm2d`, so state dicts of either fit the other.
    """

    def __init__(self, norm: nn.BatchNorm2d, meet: Callable[[], None] = lambda: None) -> None:
        """Takes over settings and tensors of a batch norm, and the dropout and activation of one of timm's.

        `meet` is called before each wait for the other processes.
        """
        super().__init__(norm.num_features, device="meta")
        self.__dict__.update(norm.__dict__)
        self.meet = meet
        self.drop = norm.drop if isinstance(norm, BatchNormAct2d) else nn.Identity()
        self.act = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes (N, C, H, W); same shape and dtype."""
        normalized = self._by_all(x) if self.training else super().forward(x)
        return self.act(self.drop(normalized))  # type: ignore[no-any-return]

    def _by_all(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        mean, var, count = _statistics(x, self.meet)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var), self.momentum)
        weight = self.weight if self.affine else torch.ones_like(self.running_var)
        bias = self.bias if self.affine else torch.zeros_like(self.running_mean)
        normalized: Tensor = _Normalize.apply(x, mean.to(weight), var.to(weight), weight, bias, count, self)
        return normalized


def share_batch_norms(root: nn.Module, meet: Callable[[], None] = lambda: None) -> None:
    """Replaces the batch norms in a module that measure, in place, by such that measure the images of all workers.

    Norms in evaluation mode keep their statistics and stay as they are. `meet` is called before each wait for the other
    processes.

    Raises:
        ValueError: a norm is of a class, or has settings, that no replacement is known for.
    """
    for name, module in list(root.named_modules()):
        if not isinstance(module, _BatchNorm) or not module.training or isinstance(module, GlobalBatchNorm2d):
            continue
        known = type(module) in (nn.BatchNorm2d, BatchNormAct2d)
        if not (
            isinstance(module, nn.BatchNorm2d) and known and module.track_running_stats and module.momentum is not None
        ):
            raise ValueError(
                f"the statistics of {name}, a {type(module).__name__}, cannot be taken over all workers; set "
                "model.sync_batch_norm=false, or model.freeze_batch_norm=true if it is the encoder's"
            )
        root.set_submodule(name, GlobalBatchNorm2d(module, meet))


@torch.no_grad()
def _statistics(x: Tensor, meet: Callable[[], None]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () of each channel over all workers, in float64."""
    channels = x.shape[1]
    full = x if x.dtype in (torch.float32, torch.float64) else x.float()
    mean, var = (of.double() for of in torch.batch_norm_update_stats(full, None, None, 0.0))
    number = x.numel() // channels
    own = torch.cat([torch.full_like(mean[:1], number), mean * number, (var + mean.square()) * number])
    meet()
    dist.all_reduce(own)
    count, mean, square = own[0], own[1 : channels + 1] / own[0], own[channels + 1 :] / own[0]
    return mean, (square - mean.square()).clamp_min(0), count


class _Normalize(torch.autograd.Function):
    """Batch norm by statistics that depend on the inputs of all workers, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, count: Tensor, norm: Any
    ) -> Tensor:
        """(N, C, h, w) by the statistics (C,) of `count` values; `norm` has `eps` and `meet`."""
        ctx.save_for_backward(x, mean, var, weight, count)
        ctx.eps, ctx.meet = norm.eps, norm.meet
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=norm.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight, count = ctx.saved_tensors
        inverse = (var + ctx.eps).rsqrt()
        # The own part of the sums of dy and of dy times the normalized x, which are also the parameters' gradients.
        backward = torch.ops.aten.native_batch_norm_backward
        sums = backward(gradient, x, weight, None, None, mean, inverse, True, ctx.eps, [False, True, True])
        of_weight, of_bias = sums[1], sums[2]
        both = torch.stack([of_weight, of_bias]).double()
        ctx.meet()
        dist.all_reduce(both)
        along, level = (both / count).to(weight)
        # weight / std * (dy - mean(dy) - normalized * mean(dy normalized)), the last two by the kernel of the norm.
        scale = weight * inverse
        of_x = F.batch_norm(x, mean, var, -scale * along, -scale * level, training=False, eps=ctx.eps)
        of_x.addcmul_(gradient, scale.to(gradient).view(1, -1, 1, 1))
        return of_x, None, None, of_weight, of_bias, None, None
