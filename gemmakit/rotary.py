"""Rotary positions: the settings' three spellings merged into one, what each type needs, and its frequencies.

The formulas are written once, with the operators that arrays of torch, numpy and jax share; each backend computes them
in its own arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gemmakit.checks import Real, check
from gemmakit.errors import ConfigError
from gemmakit.family import FULL_ATTENTION, SLIDING_ATTENTION

# Types whose table depends on the length of the call.
FOLLOW_LENGTH = ("dynamic", "longrope")
Array = Any  # of torch, numpy or jax
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
ROPE_TYPES = tuple(_ROPE_REQUIRED)
_POSITIVE = Real(0.0, above=True)
_ROPE_RANGES = {
    "factor": Real(1.0),
    "original_max_position_embeddings": Real(2.0),
    "attention_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": Real(0.0),
    "mscale_all_dim": Real(0.0),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "partial_rotary_factor": Real(0.0, 1.0, above=True),
}


def merged_rope(
    theta: float | None, parameters: dict[str, Any] | None, scaling: dict[str, Any] | None, base: float = 10000.0
) -> dict[str, Any]:
    """Merge the three spellings into one dictionary; a contradiction is refused. base: theta where none says it."""
    merged: dict[str, Any] = {}
    for spelling in (scaling, parameters):
        if spelling is None:
            continue
        if not isinstance(spelling, dict):  # pyright: ignore[reportUnnecessaryIsInstance] - a file can hold anything
            raise ConfigError(f"rope settings are {spelling!r}; they must be a dictionary with a rope_type.")
        merged.update({("rope_type" if k == "type" else k): v for k, v in spelling.items()})
    inside = merged.get("rope_theta")
    if theta is not None and inside is not None and theta != inside:
        raise ConfigError(f"rope_theta is {theta}, but rope_parameters says {inside}: give one of them.")
    merged["rope_theta"] = inside if inside is not None else base if theta is None else theta
    merged.setdefault("rope_type", "default")
    return merged


Tables = Mapping[str, Mapping[str, Any]]


def merged_ropes(
    tables: Tables,
    parameters: dict[str, Any] | None,
    theta: float | None,
    scaling: dict[str, Any] | None,
    local_theta: float | None,
) -> dict[str, Any]:
    """All spellings merged: one dictionary, or where `tables` names several and their defaults one of each name.

    theta and scaling are those of full layers, local_theta that of window layers.
    """
    if not tables:
        refuse_local(local_theta)
        return merged_rope(theta, parameters, scaling)
    defaults = {name: dict(rope) for name, rope in tables.items()}
    return changed_ropes(tables, defaults, parameters, theta, scaling, local_theta)


def changed_ropes(
    tables: Tables,
    old: dict[str, Any],
    parameters: dict[str, Any] | None,
    theta: float | None,
    scaling: dict[str, Any] | None,
    local_theta: float | None,
) -> dict[str, Any]:
    """Merged settings `old` under those that a call gives, in any spelling; a base stays unless another is given."""
    if tables:
        apart = _apart(tables, parameters)
        own = {FULL_ATTENTION: (theta, scaling), SLIDING_ATTENTION: (local_theta, None)}
        return {name: _changed_rope(old[name], apart.get(name), *own.get(name, (None, None))) for name in tables}
    refuse_local(local_theta)
    return _changed_rope(old, parameters, theta, scaling)


def refuse_local(theta: float | None) -> None:
    """ConfigError where window layers are given a base of their own and have no table of their own."""
    if theta is not None:
        raise ConfigError(f"rope_local_base_freq is {theta}, but one table serves all layers of this model.")


def _changed_rope(
    old: dict[str, Any], parameters: dict[str, Any] | None, theta: float | None, scaling: dict[str, Any] | None
) -> dict[str, Any]:
    if parameters is None and scaling is None:
        return old if theta is None else {**old, "rope_theta": theta}
    return merged_rope(theta, parameters, scaling, old["rope_theta"])


def _apart(tables: Tables, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Settings by table; those that name none are full layers'."""
    if parameters is None or not isinstance(parameters, dict) or parameters.keys() <= tables.keys():  # pyright: ignore[reportUnnecessaryIsInstance]
        return parameters or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError(f"rope_parameters names {', '.join(parameters)}; the tables are {', '.join(tables)}.")
    return {FULL_ATTENTION: parameters}


def without_theta(rope: dict[str, Any]) -> dict[str, Any] | None:
    """Merged settings in the older spelling, rope_scaling: None for the default type."""
    return None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}


def check_rope(rope: dict[str, Any], head_dim: int) -> None:
    """ConfigError unless merged settings are a type's own, and in their ranges."""
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope_type is {kind!r}; it must be one of {', '.join(ROPE_TYPES)}.")
    for name, value in rope.items():
        if isinstance(value, dict):
            raise ConfigError(f"rope settings name {name!r} apart: Gemma's layers are of one kind, with one rotation.")
    if kind != "proportional" and rope.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; Gemma rotates whole heads.")
    for name in _ROPE_REQUIRED[kind]:
        if name not in rope or (rope[name] is None and kind != "yarn"):
            raise ConfigError(f"rope_type {kind!r} needs {name!r} in rope_parameters; got {sorted(rope)}.")
    check("rope_theta", rope["rope_theta"], Real(1.0, above=True) if kind == "yarn" else _POSITIVE, ConfigError)
    for name, allowed in _ROPE_RANGES.items():
        if rope.get(name) is not None:
            check(f"rope {name}", rope[name], allowed, ConfigError)
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ConfigError(
            f"rope high_freq_factor is {rope['high_freq_factor']}; it must be above low_freq_factor, "
            f"{rope['low_freq_factor']}."
        )
    if kind == "dynamic" and head_dim < 4:
        raise ConfigError(f"head_dim is {head_dim}; rope_type 'dynamic' needs at least 4.")
    for name in ("short_factor", "long_factor"):
        if rope.get(name) is not None:
            _check_factors(name, rope[name], head_dim // 2)


def _check_factors(name: str, factors: Any, count: int) -> None:
    if not isinstance(factors, (list, tuple)) or len(cast("list[Any]", factors)) != count:
        raise ConfigError(f"rope {name} is {factors!r}; head_dim {2 * count} needs a list of {count} numbers.")
    for factor in cast("list[Any]", factors):
        check(f"rope {name}", factor, _POSITIVE, ConfigError)


@dataclass(frozen=True)
class Arrays:
    """What a backend calls the few things that are no operators. The numbers are float32.

    arange: 0 to n - 1. asarray: from a list. where: of an array of truths, or of one truth that may be a plain one.
    """

    arange: Callable[[int], Array]
    asarray: Callable[[Sequence[float]], Array]
    where: Callable[[Any, Any, Any], Any]


def frequencies(rope: dict[str, Any], head_dim: int, limit: int, length: Any, arrays: Arrays) -> tuple[Array, float]:
    """Inverse frequencies (H/2,) and the factor on cosine and sine.

    rope: merged settings. limit: the configuration's longest context. length: tokens of the call, for the types of
    FOLLOW_LENGTH: a number, or an array where it is not known yet.
    """
    exponents = arrays.arange(head_dim // 2) * 2 / head_dim
    return _FREQUENCIES[rope["rope_type"]](rope, exponents, limit, length, arrays)


def _default(rope: dict[str, Any], exponents: Array, *_: Any) -> tuple[Array, float]:
    return 1.0 / rope["rope_theta"] ** exponents, 1.0


def _linear(rope: dict[str, Any], exponents: Array, *_: Any) -> tuple[Array, float]:
    """Position interpolation. Source: arXiv:2306.15595."""
    return _default(rope, exponents)[0] / rope["factor"], 1.0


def _dynamic(rope: dict[str, Any], exponents: Array, limit: int, length: Any, arrays: Arrays) -> tuple[Array, float]:
    """NTK-aware scaling that grows with the context."""
    factor, H = rope["factor"], 2 * len(exponents)
    longest = arrays.where(length > limit, length, limit)
    base = rope["rope_theta"] * (factor * longest / limit - (factor - 1)) ** (H / (H - 2))
    return 1.0 / base**exponents, 1.0


def _yarn(rope: dict[str, Any], exponents: Array, limit: int, _: Any, arrays: Arrays) -> tuple[Array, float]:
    """Interpolate slow features, keep fast ones, ramp between. Source: arXiv:2309.00071."""
    trained = rope.get("original_max_position_embeddings") or limit
    factor = rope["factor"] or limit / trained
    theta, H = rope["rope_theta"], 2 * len(exponents)

    def feature(turns: float) -> float:  # the feature index that makes `turns` turns over the trained context
        return H * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature(rope.get("beta_fast") or 32), feature(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    width = (high if high != low else high + 0.001) - low
    keep = 1 - ((arrays.arange(H // 2) - low) / width).clip(0, 1)
    scale = theta**exponents
    return 1.0 / (factor * scale) * (1 - keep) + 1.0 / scale * keep, _yarn_scaling(rope, factor)


def _yarn_scaling(rope: dict[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def temperature(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)


def _llama3(rope: dict[str, Any], exponents: Array, _: int, __: Any, arrays: Arrays) -> tuple[Array, float]:
    """Divide long wavelengths by the factor, keep short ones, blend between. Source: arXiv:2407.21783."""
    inv_freq = _default(rope, exponents)[0]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    trained, factor = rope["original_max_position_embeddings"], rope["factor"]
    wavelength = 2 * math.pi / inv_freq
    blend = (trained / wavelength - low) / (high - low)
    smooth = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = arrays.where(wavelength > trained / low, inv_freq / factor, inv_freq)
    between = ~(wavelength < trained / high) & ~(wavelength > trained / low)
    return arrays.where(between, smooth, scaled), 1.0


def _longrope(rope: dict[str, Any], exponents: Array, limit: int, length: Any, arrays: Arrays) -> tuple[Array, float]:
    """One factor a feature, another set beyond the trained context. Source: arXiv:2402.13753."""
    trained = rope.get("original_max_position_embeddings") or limit
    factor = rope.get("factor") or limit / trained
    scaling = rope.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    scale = rope["rope_theta"] ** exponents
    short, long = (1.0 / (arrays.asarray(rope[f"{name}_factor"]) * scale) for name in ("short", "long"))
    return arrays.where(length > trained, long, short), scaling


def _proportional(rope: dict[str, Any], exponents: Array, _: int, __: Any, arrays: Arrays) -> tuple[Array, float]:
    """Only the first features of each half turn, as fast as if all did; the others stand still."""
    inv_freq, scaling = _default(rope, exponents)
    turning = int((rope.get("partial_rotary_factor") or 1.0) * 2 * len(exponents) // 2)
    still = arrays.arange(len(exponents)) >= turning
    return arrays.where(still, 0.0, inv_freq) / (rope.get("factor") or 1.0), scaling


_FREQUENCIES: dict[str, Callable[..., tuple[Array, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}
