"""What `train.compile` compiles: one graph for each region, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrnet.calibration.refine import _refine_by_slices, affinities
from slrnet.config import Config, ViewsConfig, apply_overrides
from slrnet.models.slrnet import SLRNet, build_network
from slrnet.ops.compiled import compile_regions, with_compiler
from slrnet.views.color import apply_color, draw_color

STILL = ("model.dropout=0.0", "model.gate_rate=0.0", "train.precision=fp32")


def network(config: Config, *changes: str) -> SLRNet:
    torch.manual_seed(0)
    model = build_network(apply_overrides(config, [*STILL, "model.lift_skip=true", *changes]), num_classes=4)
    assert isinstance(model, SLRNet)
    return model.train()


def calls_of(model: SLRNet) -> list[tuple[nn.Module, tuple[Any, ...]]]:
    """Each region with what it gets for a small image."""
    found: list[tuple[nn.Module, tuple[Any, ...]]] = []
    hooks = [part.register_forward_pre_hook(lambda part, args: found.append((part, args))) for part in model.regions()]
    with torch.no_grad():
        model([torch.rand(2, 3, 33, 33)])
    for hook in hooks:
        hook.remove()
    return found


def breaks(function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
    """Why the compiler would stop within a function."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(function)(*arguments, **named)
    return [] if found.graph_count == 1 and not found.graph_break_count else found.break_reasons or [found]


@pytest.mark.parametrize("encoder", ["timm:test_resnet", pytest.param("wide_resnet38", marks=pytest.mark.slow)])
def test_a_region_is_one_graph(encoder: str, tiny_config: Config) -> None:
    calls = calls_of(network(tiny_config, f"model.encoder={encoder}"))
    assert len(calls) == 8, "every region, once"
    for part, arguments in calls:
        assert breaks(part, *arguments) == [], type(part).__name__


def test_colors_and_refinement_are_one_graph_each() -> None:
    images, probs = torch.rand(2, 3, 9, 7), torch.rand(2, 2, 9, 7)
    drawn = draw_color(2, ViewsConfig(), generator=torch.Generator())
    weights = affinities(images, dilations=(1, 2))
    assert breaks(apply_color, images, drawn) == []
    assert breaks(affinities, images, dilations=(1, 2)) == []
    assert breaks(_refine_by_slices, probs, weights, 2, (1, 2)) == []


@pytest.mark.slow
def test_compiled_regions_give_the_same_numbers(tiny_config: Config) -> None:
    images = torch.rand(2, 3, 33, 33)

    def run(model: SLRNet) -> list[Tensor]:
        outputs = model([images])
        total = outputs.logits[0].square().mean() + outputs.auxiliary_logits[0].square().mean()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [outputs.logits[0], *torch.autograd.grad(total, weights)]

    plain, compiled = network(tiny_config), network(tiny_config)
    for region in compiled.regions():
        region.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for own, expected in zip(run(compiled), run(plain), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def test_without_the_setting_a_function_stays_as_it_is() -> None:
    assert with_compiler(apply_color, False) is apply_color
    assert with_compiler(apply_color, True) is with_compiler(apply_color, True) is not apply_color


@pytest.mark.parametrize(
    ("device", "message"),
    [("cpu", "train.compile is for GPUs, .* set train.compile=false"), ("cuda", "no compiler, or set train.compile")],
)
def test_where_it_cannot_run_the_message_says_why(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrnet.ops.compiled.triton_obstacle", lambda: "no compiler")
    with pytest.raises(ValueError, match=message):
        compile_regions([nn.Identity()], torch.device(device))
