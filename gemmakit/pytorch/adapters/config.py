"""What an adapter is, as PEFT's adapter_config.json says it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from gemmakit.checks import FLAG, Real, Whole, check, check_fields
from gemmakit.errors import InputError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
# Keys of the file that say how an adapter was begun or where it is from: nothing that its numbers depend on.
_HISTORY = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
# What may be written down and asks for nothing.
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {})


@dataclass(frozen=True)
class LoraConfig:
    """W + (lora_alpha / r) B A, on some modules.

    r: rank. lora_alpha: the update is scaled by lora_alpha / r, with `use_rslora` by lora_alpha / sqrt(r).
    lora_dropout: of what A reads, in training. target_modules: ends of module names, or a regular expression for the
    whole name, or "all-linear": every projection but the head. use_dora: the columns' length is learnt apart from their
    direction. rank_pattern, alpha_pattern: other numbers for modules whose names end so.

    Raises InputError for numbers out of range and for what is no regular expression.
    Sources: arXiv:2106.09685, arXiv:2312.03732, arXiv:2402.09353.
    """

    r: Annotated[int, Whole(1)] = 16
    lora_alpha: Annotated[float, Real(0, above=True)] = 32
    lora_dropout: Annotated[float, Real(0, 1, below=True)] = 0.0
    target_modules: tuple[str, ...] | str = PROJECTIONS
    use_rslora: Annotated[bool, FLAG] = False
    use_dora: Annotated[bool, FLAG] = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, InputError)
        for key, r in self.rank_pattern:
            check(f"rank_pattern[{key!r}]", r, Whole(1), InputError)
        for key, alpha in self.alpha_pattern:
            check(f"alpha_pattern[{key!r}]", alpha, Real(0, above=True), InputError)
        expressions = [key for key, _ in (*self.rank_pattern, *self.alpha_pattern)]
        if isinstance(self.target_modules, str):
            expressions.append(self.target_modules)
        for expression in expressions:
            _check_expression(expression)

    def rank(self, name: str) -> int:
        return next((r for key, r in self.rank_pattern if _ends(key, name)), self.r)

    def scaling(self, name: str) -> float:
        """What B A is multiplied by in the module called `name`."""
        alpha, r = next((a for key, a in self.alpha_pattern if _ends(key, name)), self.lora_alpha), self.rank(name)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def targets(self, name: str) -> bool:
        """Whether the module of that name gets an adapter; what "all-linear" means is not asked here."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(name == end or name.endswith(f".{end}") for end in self.target_modules)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT reads it."""
        found = asdict(self)
        targets = self.target_modules
        found["target_modules"] = targets if isinstance(targets, str) else list(targets)
        found |= {key: dict(found[key]) for key in ("rank_pattern", "alpha_pattern")}
        return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True, **found}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> LoraConfig:
        """Raises InputError for another method than LoRA, or one with parts that are not read here, by name."""
        kind = values.get("peft_type")
        if kind != "LORA":
            raise InputError(f"{where} is an adapter of the kind {kind!r}; gemmakit reads LORA, DoRA included.")
        fields = cls.__dataclass_fields__
        foreign = {
            key: value
            for key, value in values.items()
            if key not in fields and key not in _HISTORY and key != "peft_type" and value not in _NOTHING
        }
        if foreign:
            told = ", ".join(f"{key}={value!r:.40}" for key, value in sorted(foreign.items()))
            raise InputError(
                f"{where} asks for {told}, which gemmakit does not apply, so the adapter would give other numbers. "
                "Merge it into the model with peft, and load what that saves."
            )
        known = {key: value for key, value in values.items() if key in fields and value is not None}
        targets = known.get("target_modules", PROJECTIONS)
        if not isinstance(targets, str) and not _all_text(targets):
            raise InputError(f"{where}: target_modules is {targets!r:.60}; it must be a text or a list of texts.")
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(known.get(key, {}), dict):
                raise InputError(f"{where}: {key} is {known[key]!r:.60}; it must map names of modules to numbers.")
        known["target_modules"] = targets if isinstance(targets, str) else tuple(sorted(targets))
        known |= {key: tuple(dict(known.get(key, {})).items()) for key in ("rank_pattern", "alpha_pattern")}
        return cls(**known)


def _all_text(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def _check_expression(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise InputError(f"{text!r} is no regular expression for names of modules: {error}.") from None


def _ends(pattern: str, name: str) -> bool:
    """As PEFT matches the keys of its patterns: the end of a name, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
