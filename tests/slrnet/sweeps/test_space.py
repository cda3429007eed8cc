"""Search spaces: how they are written, what is refused, what values become."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrnet.config import ConfigError
from slrnet.recipes import RECIPES, get_recipe
from slrnet.sweeps.space import DEFAULT_SPACE, Domain, apply_values, check_space, get_space, parse_domain, space_with


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=loguniform:1e-4:.01", Domain("optim.lr", "loguniform", (1e-4, 0.01))),
        ("calibration.floor=uniform:0:0.5", Domain("calibration.floor", "uniform", (0.0, 0.5))),
        ("cvlr.num_iters=int:1:6", Domain("cvlr.num_iters", "int", (1, 6))),
        ("cvlr.dim=choice:64,256", Domain("cvlr.dim", "choice", (64, 256))),
        ("views.scales=choice:[1.0],[1.0,0.5]", Domain("views.scales", "choice", ([1.0], [1.0, 0.5]))),
        ("cvlr.method=choice:cvlr, free", Domain("cvlr.method", "choice", ("cvlr", "free"))),
        ("views.flip=choice:true,false", Domain("views.flip", "choice", (True, False))),
    ],
)
def test_texts(text: str, expected: Domain) -> None:
    assert parse_domain(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cvlr.dim", "is not section.field=KIND:VALUES"),
        ("cvlr.dim=64,256", "KIND one of uniform, loguniform, int, choice"),
        ("cvlr.dim=normal:0:1", "KIND one of"),
        ("cvlr.dim=choice:64", "has 1 choice; give at least two"),
        ("cvlr.num_iters=int:1.5:3", "needs two whole numbers"),
        ("optim.lr=uniform:1", "needs two numbers"),
        ("optim.lr=uniform:1:1", "LOW must be below HIGH"),
        ("optim.lr=loguniform:0:1", "below HIGH above 0"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_domain(text)


@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e3))
def test_a_domain_is_read_back_from_its_text(low: float, factor: float) -> None:
    domain = parse_domain(f"optim.lr=loguniform:{low:g}:{low * factor:g}")
    assert parse_domain(str(domain)) == domain


@pytest.mark.parametrize("domain", DEFAULT_SPACE, ids=str)
def test_default_domains_are_read_back(domain: Domain) -> None:
    assert parse_domain(str(domain)) == domain


def test_the_command_line_replaces_adds_and_leaves_out() -> None:
    space = space_with(DEFAULT_SPACE, ["cvlr.dim=choice:8,16", "optim.lr=uniform:1:2", "cvlr.num_iters=fixed"])
    assert [domain.key for domain in space] == [
        "weights.consistency", "cvlr.dim", "calibration.confidence_threshold", "optim.lr",
    ]  # fmt: skip
    assert space[1].values == (8, 16)
    with pytest.raises(ConfigError, match="is not searched, so it is fixed already"):
        space_with(DEFAULT_SPACE, ["optim.lr=fixed"])


def test_every_recipe_has_a_space_that_fits_it() -> None:
    for recipe in RECIPES:
        space = get_space(recipe)
        check_space(get_recipe(recipe), space)
        assert len({domain.key for domain in space}) == len(space) >= 2, recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cvlr.dims=choice:1,2", "nearest one is 'cvlr.dim'"),
        ("calibration.confidence_threshold=uniform:0.5:1.5", "less than or equal to 1"),
        ("cvlr.dim=uniform:8:9", "cvlr.dim"),
        ("train.pretrain_epochs=int:1:30", "must be smaller than epochs"),
        ("crf.num_iters=int:1:5", "changes no training"),
        ("tracking.experiment=choice:a,b", "changes no training"),
    ],
)
def test_spaces_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(get_recipe("voc_wsss"), [parse_domain(text)])


def test_settings_of_a_module_that_is_off_are_refused() -> None:
    config = apply_values(get_recipe("voc_wsss"), {"cvlr.enabled": False})
    with pytest.raises(ConfigError, match=r"cvlr.dim does nothing while cvlr.enabled is false"):
        check_space(config, [parse_domain("cvlr.dim=choice:8,16")])
    with pytest.raises(ConfigError, match="the search space is empty"):
        check_space(config, [])


def test_values_become_settings() -> None:
    values = {"cvlr.dim": 64, "views.scales": [1.0], "cvlr.method": "free", "views.flip": False, "optim.lr": 1e-3}
    config = apply_values(get_recipe("voc_wsss"), values)
    flat = config.flat()
    assert {key: flat[key] for key in values} == values


@pytest.mark.parametrize(
    ("text", "value", "near"),
    [
        ("optim.lr=loguniform:0.1:1", 0.5, {0.6, 0.5 / 1.2}),
        ("optim.lr=loguniform:0.1:1", 1.0, {1.0, 1.0 / 1.2}),
        ("calibration.floor=uniform:0:1", 0.5, {0.6, 0.4}),
        ("calibration.floor=uniform:0:1", 0.0, {0.1, 0.0}),
        ("cvlr.num_iters=int:1:6", 6, {5, 6}),
        ("cvlr.dim=choice:64,256,512", 256, {64, 512}),
        ("cvlr.dim=choice:64,256,512", 64, {64, 256}),
    ],
)
def test_neighbors_lie_on_both_sides_and_within(text: str, value: float, near: set[float]) -> None:
    rng = random.Random(0)
    assert {parse_domain(text).neighbor(value, rng) for _ in range(30)} == near


@pytest.mark.parametrize(
    "domain", [*DEFAULT_SPACE, parse_domain("cvlr.num_iters=int:1:6")], ids=lambda domain: domain.kind
)
def test_draws_fill_the_domain(domain: Domain) -> None:
    rng = random.Random(0)
    drawn = [domain.draw(rng) for _ in range(300)]
    if domain.kind in ("choice", "int"):
        assert set(drawn) == set(domain.values if domain.kind == "choice" else range(1, 7))
        return
    low, high = domain.values
    assert low <= min(drawn) < max(drawn) <= high
    middle = (low * high) ** 0.5 if domain.kind == "loguniform" else (low + high) / 2
    assert 100 < sum(value < middle for value in drawn) < 200
