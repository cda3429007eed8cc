"""Low-rank adaptation: trained corrections of few weights to linear layers whose own weights stay (Hu et al. 2022)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LowRankLinear", "adapt"]


class LowRankLinear(nn.Linear):
    """A linear layer plus a product of two thin matrices, which starts at zero.

    The layer's own parameters keep their names and do not train, so weights of the plain layer fit.

    Args:
        layer: the layer to adapt; its tensors are taken over.
        rank: columns of the first and rows of the second matrix.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.requires_grad_(False)
        self.lora_down = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up)


def adapt(root: nn.Module, names: set[str], *, rank: int) -> int:
    """Replaces linear layers in a module, in place, by adapted ones.

    Args:
        root: the module.
        names: layers that may be replaced, by their names in `root`.
        rank: of the corrections.

    Returns:
        Number of layers replaced. Layers whose owner multiplies by their weights itself, as EVA-02 does for queries,
        keys and values, would ignore a correction and are left.
    """
    count = 0
    for name, layer in list(root.named_modules()):
        unused = getattr(root.get_submodule(name.rpartition(".")[0]), "q_bias", None) is not None
        if type(layer) is nn.Linear and name in names and not (name.endswith("qkv") and unused):
            root.set_submodule(name, LowRankLinear(layer, rank))
            count += 1
    return count
