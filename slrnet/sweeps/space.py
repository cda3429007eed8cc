"""Search spaces: which settings a sweep tries, and how values are drawn.

A domain is written `section.field=KIND:VALUES`, for instance `weights.consistency=loguniform:0.25:16`,
`cvlr.num_iters=int:1:6`, `cvlr.dim=choice:64,256` or `views.scales=choice:[1.0],[1.0,0.5]`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slrnet.config import Config, ConfigError, apply_overrides
from slrnet.recipes import get_recipe

__all__ = ["DEFAULT_SPACE", "Domain", "apply_values", "check_space", "get_space", "parse_domain", "space_with"]

Kind = Literal["uniform", "loguniform", "int", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_UNTRAINED = ("recipe", "data.path", "tracking.", "crf.", "inference.")
"""Settings that change neither the training nor its metrics."""


@dataclass(frozen=True)
class Domain:
    """The values that a sweep may give one setting."""

    key: str
    """`section.field` of the configuration."""
    kind: Kind
    """`uniform` or `loguniform` between two numbers, `int` for whole numbers with both ends, or `choice`."""
    values: tuple[Any, ...]
    """(low, high), or the choices."""

    def __str__(self) -> str:
        """The domain as written on the command line."""
        if self.kind == "choice":
            return f"{self.key}=choice:{','.join(json.dumps(value) for value in self.values)}"
        return f"{self.key}={self.kind}:{self.values[0]:g}:{self.values[1]:g}"

    def __contains__(self, value: Any) -> bool:
        return value in self.values if self.kind == "choice" else bool(self.values[0] <= value <= self.values[1])

    def grid(self) -> list[Any]:
        """All values; raises a `ConfigError` if the domain is continuous."""
        if self.kind == "choice":
            return list(self.values)
        if self.kind == "int":
            return list(range(self.values[0], self.values[1] + 1))
        raise ConfigError(f"a grid needs choices; write {self.key}=choice:A,B,C instead of {str(self)!r}")

    def draw(self, rng: random.Random) -> Any:
        """A random value."""
        if self.kind in ("choice", "int"):
            return rng.choice(self.grid())
        low, high = self.values
        if self.kind == "loguniform":
            return self._clipped(math.exp(rng.uniform(math.log(low), math.log(high))))
        return rng.uniform(low, high)

    def neighbor(self, value: Any, rng: random.Random) -> Any:
        """A value just above or below another one, within the domain.

        The next choice or whole number; a tenth of the range of `uniform` away; for `loguniform` a factor of 1.2.
        """
        up = rng.random() < 0.5
        if self.kind == "choice":
            place = self.values.index(value) + (1 if up else -1)
            return self.values[min(max(place, 0), len(self.values) - 1)]
        if self.kind == "loguniform":
            return self._clipped(value * 1.2 if up else value / 1.2)
        step = 1 if self.kind == "int" else 0.1 * (self.values[1] - self.values[0])
        return self._clipped(value + step if up else value - step)

    def _clipped(self, value: Any) -> Any:
        return sorted((value, *self.values))[1]


DEFAULT_SPACE: tuple[Domain, ...] = (
    Domain("weights.consistency", "loguniform", (0.25, 16.0)),
    Domain("cvlr.num_iters", "int", (1, 6)),
    Domain("cvlr.dim", "choice", (64, 128, 256, 512, 1024)),
    Domain("calibration.confidence_threshold", "uniform", (0.3, 0.9)),
)
"""lambda_reg, T, d and gamma."""


def get_space(name: str) -> tuple[Domain, ...]:
    """The search space of a recipe, which `slrnet tune` tries by default; raises a `ConfigError` for another name."""
    config = get_recipe(name)
    if not config.cvlr.enabled:
        rates = {"optim.lr": (2e-4, 5e-3), "optim.weight_decay": (1e-5, 1e-3)}
        return tuple(Domain(key, "loguniform", ends) for key, ends in rates.items())
    if config.setting == "sss":  # thresholds keep less where no image label rules a class out
        gamma = Domain("calibration.confidence_threshold", "uniform", (0.5, 0.95))
        return tuple(gamma if domain.key == gamma.key else domain for domain in DEFAULT_SPACE)
    return DEFAULT_SPACE


def parse_domain(text: str) -> Domain:
    """Reads `section.field=KIND:VALUES`.

    Raises:
        ConfigError: the text has another form or an unknown kind, or LOW is not below HIGH.
    """
    key, equals, rest = text.partition("=")
    kind, colon, values = rest.partition(":")
    if not equals or not colon or kind not in KINDS:
        raise ConfigError(
            f"search domain {text!r} is not section.field=KIND:VALUES with KIND one of {', '.join(KINDS)}; write for "
            "instance optim.lr=loguniform:1e-4:1e-2, cvlr.num_iters=int:1:6 or cvlr.dim=choice:64,256"
        )
    if kind == "choice":
        try:
            choices = json.loads(f"[{values}]")
        except ValueError:
            choices = [part.strip() for part in values.split(",")]
        if len(choices) < 2:
            raise ConfigError(
                f"search domain {text!r} has {len(choices)} choice; give at least two, separated by commas"
            )
        return Domain(key.strip(), "choice", tuple(choices))
    return Domain(key.strip(), kind, _ends(text, kind, values))


def space_with(base: Iterable[Domain], texts: Iterable[str]) -> tuple[Domain, ...]:
    """Adds the domains of the command line to a recipe's space; each replaces one of the same setting.

    A text is `section.field=KIND:VALUES`, or `section.field=fixed` to leave a setting out.

    Raises:
        ConfigError: a text cannot be read, or leaves out a setting that is not searched.
    """
    domains = {domain.key: domain for domain in base}
    for text in texts:
        key, _, rest = text.partition("=")
        if rest.strip() == "fixed":
            if domains.pop(key.strip(), None) is None:
                raise ConfigError(f"{key!r} is not searched, so it is fixed already; searched are {', '.join(domains)}")
        else:
            domain = parse_domain(text)
            domains[domain.key] = domain
    return tuple(domains.values())


def check_space(config: Config, space: Sequence[Domain]) -> None:
    """Refuses a space that allows an invalid configuration or searches a setting without effect.

    Raises:
        ConfigError: the space is empty, a key is unknown, a value is out of range, or a setting changes no training.
    """
    if not space:
        raise ConfigError("the search space is empty; give --search section.field=KIND:VALUES")
    for domain in space:
        if domain.key.startswith(_UNTRAINED):
            raise ConfigError(f"{domain.key} changes no training, so there is nothing to search")
        if domain.key.startswith("cvlr.") and domain.key != "cvlr.enabled" and not config.cvlr.enabled:
            raise ConfigError(
                f"{domain.key} does nothing while cvlr.enabled is false; leave it out ({domain.key}=fixed)"
            )
        low, high = domain.values[0], domain.values[-1]
        between = () if domain.kind in ("choice", "int") else (low + 0.37 * (high - low),)
        for value in (*domain.values, *between):
            try:
                apply_values(config, {domain.key: value})
            except ConfigError as error:
                raise ConfigError(f"search domain {str(domain)!r}: {error}") from None


def apply_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Replaces settings by plain values; raises a `ConfigError` for an unknown key or a wrong type or range."""
    texts = (value if isinstance(value, str) else json.dumps(value) for value in values.values())
    return apply_overrides(config, [f"{key}={text}" for key, text in zip(values, texts, strict=True)])


def _ends(text: str, kind: str, values: str) -> tuple[float | int, float | int]:
    parts = values.split(":")
    try:
        low, high = (int(part) if kind == "int" else float(part) for part in parts)
    except ValueError:
        what = "whole numbers" if kind == "int" else "numbers"
        raise ConfigError(f"search domain {text!r} needs two {what}, {kind}:LOW:HIGH; got {values!r}") from None
    if not low < high or (kind == "loguniform" and low <= 0):
        above = " above 0" if kind == "loguniform" else ""
        raise ConfigError(f"search domain {text!r} runs from {low:g} to {high:g}; LOW must be below HIGH{above}")
    return low, high
