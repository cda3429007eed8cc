"""The paper's ablations as data."""

from __future__ import annotations

import pytest

from slrnet.config import ConfigError, apply_overrides
from slrnet.recipes import get_recipe
from slrnet.sweeps.ablations import ABLATIONS, choose_variants


@pytest.mark.parametrize("recipe", ["voc_wsss", "voc_wsss_lite"])
@pytest.mark.parametrize("name", list(ABLATIONS))
def test_variants_are_valid_and_differ(name: str, recipe: str) -> None:
    variants = ABLATIONS[name].variants
    configs = [apply_overrides(get_recipe(recipe), variant.changes).to_json() for variant in variants]
    assert len(set(configs)) == len(variants) >= 3
    assert len({variant.label for variant in variants}) == len(variants)


def test_tables_carry_the_papers_figures_and_plots_an_axis() -> None:
    for name, ablation in ABLATIONS.items():
        is_table = name.startswith("table")
        assert all((variant.paper is not None) == is_table for variant in ablation.variants), name
        assert all(
            (variant.x is not None) == (name in ("fig4", "fig6-left", "fig6-right")) for variant in ablation.variants
        )
    best = {
        name: max(ABLATIONS[name].variants, key=lambda variant: variant.paper or 0) for name in ("table7", "table8")
    }
    assert best["table7"].label == "(0.5, 1.0) color + flip"
    assert best["table8"].label == "CVLR"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown ablation 'fig5'; known are fig4, "):
        choose_variants("fig5")
