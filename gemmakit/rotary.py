"""The rotary settings of a configuration: the three spellings merged into one, and what each type needs."""

from __future__ import annotations

from typing import Any, cast

from gemmakit.checks import Real, check
from gemmakit.errors import ConfigError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
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
}


def merged_rope(
    theta: float | None, parameters: dict[str, Any] | None, scaling: dict[str, Any] | None
) -> dict[str, Any]:
    """Merge the three spellings into one dictionary; a contradiction is refused."""
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
    merged["rope_theta"] = inside if inside is not None else 10000.0 if theta is None else theta
    merged.setdefault("rope_type", "default")
    return merged


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
    if rope.get("partial_rotary_factor") not in (None, 1):
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
