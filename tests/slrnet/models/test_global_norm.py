"""Batch norms over all workers, in a group of one; `test_trainer_distributed` compares two unequal ranks with one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slrnet.models.frozen_norm import FrozenBatchNorm2d
from slrnet.models.global_norm import GlobalBatchNorm2d, share_batch_norms

NORMS: dict[str, Callable[[], nn.BatchNorm2d]] = {
    "affine": lambda: nn.BatchNorm2d(4, momentum=0.05),
    "plain": lambda: nn.BatchNorm2d(4, eps=1e-8, affine=False),
    "timm": lambda: BatchNormAct2d(4),
}


def network(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), NORMS[norm](), nn.Sigmoid(), nn.Conv2d(4, 2, 1)).double()


def both_views(model: nn.Module) -> dict[str, Tensor]:
    """Outputs, gradients and statistics after two views of five images, the second one smaller."""
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    first, second = model(images), model(images[..., ::2, ::2])
    ((first - 1).square().sum() + second.pow(3).sum()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert images.grad is not None
    return {"first": first, "second": second, "of images": images.grad} | gradients | dict(model.named_buffers())


@pytest.mark.usefixtures("group_of_one")
class TestAlone:
    images = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(2))

    @pytest.mark.parametrize("norm", NORMS)
    def test_it_is_the_usual_norm_in_outputs_gradients_and_statistics(self, norm: str) -> None:
        usual = network(norm)
        shared = deepcopy(usual)
        waits: list[int] = []
        share_batch_norms(shared, lambda: waits.append(1))
        assert type(shared[1]) is GlobalBatchNorm2d
        torch.testing.assert_close(both_views(shared), both_views(usual))
        assert len(waits) == 4  # two views, forward and backward

    def test_bfloat16_has_statistics_in_float32(self) -> None:
        usual = nn.BatchNorm2d(4)
        shared = GlobalBatchNorm2d(deepcopy(usual))
        images = (100 + self.images).bfloat16()
        result = shared(images)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result, usual(images))
        assert shared.running_mean is not None
        torch.testing.assert_close(shared.running_mean, usual.running_mean)

    def test_a_recomputed_forward_pass_gives_the_same_gradients(self) -> None:
        plain, again = (GlobalBatchNorm2d(nn.BatchNorm2d(4)) for _ in range(2))
        inputs = [self.images.clone().requires_grad_() for _ in range(2)]
        (plain(inputs[0]) ** 3).sum().backward()
        (checkpoint(again, inputs[1], use_reentrant=False) ** 3).sum().backward()
        assert inputs[0].grad is not None
        assert inputs[1].grad is not None
        assert inputs[0].grad.equal(inputs[1].grad)

    def test_only_norms_that_measure_are_replaced(self) -> None:
        model = nn.Sequential(nn.BatchNorm2d(4), FrozenBatchNorm2d(nn.BatchNorm2d(4)), nn.BatchNorm2d(4).eval())
        share_batch_norms(model)
        share_batch_norms(model)
        assert [type(norm) for norm in model] == [GlobalBatchNorm2d, FrozenBatchNorm2d, nn.BatchNorm2d]

    def test_a_norm_without_a_known_replacement_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"0, a BatchNorm3d, .* model\.sync_batch_norm=false"):
            share_batch_norms(nn.Sequential(nn.BatchNorm3d(4)))


def test_in_evaluation_it_is_the_usual_one_and_needs_no_group() -> None:
    usual = nn.BatchNorm2d(4).eval()
    assert GlobalBatchNorm2d(deepcopy(usual)).eval()(TestAlone.images).equal(usual(TestAlone.images))
