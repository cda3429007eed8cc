"""Batch norms over all workers: alone against the usual norm, and two ranks against one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import TypeAlias, TypeVar

import pytest
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slrnet.models.frozen_norm import FrozenBatchNorm2d
from slrnet.models.global_norm import GlobalBatchNorm2d, share_batch_norms

Result = TypeVar("Result")
OnTwo: TypeAlias = "Callable[[Callable[[int], Result]], list[Result]]"
NORMS: dict[str, Callable[[], nn.BatchNorm2d]] = {
    "affine": lambda: nn.BatchNorm2d(4, momentum=0.05),
    "plain": lambda: nn.BatchNorm2d(4, eps=1e-8, affine=False),
    "timm": lambda: BatchNormAct2d(4),
}


def network(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), NORMS[norm](), nn.Sigmoid(), nn.Conv2d(4, 2, 1)).double()


def both_views(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Gradients and statistics after two views of some of five images, the second one smaller."""
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    views = [model(images[rows]), model(images[rows, :, ::2, ::2])]
    sum(((view - 1) ** 2 * torch.arange(1, 6)[rows].view(-1, 1, 1, 1)).sum() for view in views).backward()  # type: ignore[union-attr]
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return gradients | dict(model.named_buffers())


@pytest.fixture
def on_two() -> Iterator[OnTwo]:
    """Runs a function of the rank on two ranks, which are threads of this process, by torch's own group for tests."""
    from torch.testing._internal.distributed import multi_threaded_pg

    multi_threaded_pg._install_threaded_pg()
    store = dist.HashStore()

    def run_rank(work: Callable[[int], Result], rank: int) -> Result:
        dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
        try:
            return work(rank)
        finally:
            dist.destroy_process_group()

    def run(work: Callable[[int], Result]) -> list[Result]:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(partial(run_rank, work), range(2)))

    yield run
    multi_threaded_pg._uninstall_threaded_pg()


@pytest.mark.parametrize("norm", NORMS)
def test_two_unequal_shares_are_the_whole_batch(norm: str, on_two: OnTwo) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        model = deepcopy(whole)
        share_batch_norms(model)
        return both_views(model, slice(0, 2) if rank == 0 else slice(2, 5))

    whole = network(norm)
    first, second = on_two(work)
    expected = both_views(whole, slice(5))
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        if name in dict(whole.named_buffers()):
            assert first[name].equal(second[name])
            torch.testing.assert_close(first[name], value)
        else:
            torch.testing.assert_close(first[name] + second[name], value)


@pytest.mark.usefixtures("group_of_one")
class TestAlone:
    images = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(2))

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
