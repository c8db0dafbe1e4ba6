"""What an adapter is, as PEFT's adapter_config.json says it."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
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
# Of expressions that a file brings: the characters of one, the length of a name that they meet, and how many ways of
# dividing it among their repeats may be tried, which takes seconds.
MAX_EXPRESSION, NAME_LENGTH, MAX_WAYS = 4096, 40, 10**8
_PARSER: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
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
        expressions = [(key, _ending(key)) for key, _ in (*self.rank_pattern, *self.alpha_pattern)]
        if isinstance(self.target_modules, str):
            expressions.append((self.target_modules, self.target_modules))
        _check_expressions(expressions)

    def rank(self, name: str) -> int:
        return next((r for key, r in self.rank_pattern if _ends(key, name)), self.r)

    def scaling(self, name: str) -> float:
        """What B A is multiplied by in the module called `name`."""
        alpha, r = next((a for key, a in self.alpha_pattern if _ends(key, name)), self.lora_alpha), self.rank(name)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def targets(self, name: str) -> bool:
        """Whether the module of that name gets an adapter; what "all-linear" means is not asked here."""
        if isinstance(self.target_modules, str):
            return _compiled(self.target_modules).fullmatch(name) is not None
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


def _check_expressions(texts: Sequence[tuple[str, str]]) -> None:
    """A file may bring any: those that a name of a module can keep busy for ever are refused before they are used.

    texts: each as it was written, and as it is matched.
    """
    ways = 0.0
    for text, matched in texts:
        try:
            ways += _ways(_PARSER.parse(text)) if len(text) <= MAX_EXPRESSION else math.inf
            if ways <= MAX_WAYS:
                _compiled(matched)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{text!r:.200} is no regular expression for names of modules: {error}.") from None
        if ways > MAX_WAYS:
            raise InputError(
                f"{text!r:.200} is a regular expression that may take for ever to match a name of a module: write it "
                f"with fewer repeats, none within another, in at most {MAX_EXPRESSION} characters, or list the names."
            )


def _ways(parsed: Any) -> float:
    """How many ways there are at most to divide a name among the parts of an expression: what matching may try.

    parsed: what Python's own parser of expressions gives, pairs of an operator and what it is for.
    """
    ways, repeats = 1.0, 0
    for operator, inner in parsed:
        match operator.name:
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                least, most, body = inner
                each, times = _ways(body), min(int(most), NAME_LENGTH)
                if times > 1 and (each > 1 or body.getwidth()[0] != 1):
                    return math.inf
                repeats += times > least + 1
                ways *= each if times > least + 1 else each * (times - least + 1)
            case "BRANCH":
                ways *= sum(map(_ways, inner[1]))
            case "SUBPATTERN" | "ATOMIC_GROUP":
                ways *= _ways(inner[-1] if isinstance(inner, tuple) else inner)
            case "ASSERT" | "ASSERT_NOT":
                ways *= _ways(inner[1])
            case "GROUPREF_EXISTS":
                ways *= sum(_ways(branch) for branch in inner[1:] if branch is not None)
            case _:
                pass
    return ways * math.comb(NAME_LENGTH + repeats, repeats)


@cache
def _compiled(text: str) -> re.Pattern[str]:
    return re.compile(text)


def _ends(pattern: str, name: str) -> bool:
    """As PEFT matches the keys of its patterns: the end of a name, from a dot on."""
    return _compiled(_ending(pattern)).match(name) is not None


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
