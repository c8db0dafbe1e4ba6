"""GenerationConfig: every setting of generate(), with its range."""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, GenerationConfigError
from gemmakit.hub import find_file


@dataclass(repr=False)
class GenerationConfig:
    """Settings of generate(). What a call gives wins over the model's own, which win over these defaults.

    Length
        max_length: prompt and new tokens together. max_new_tokens: new tokens alone, wins over max_length; with
        neither, 20 new tokens. min_length, min_new_tokens: no eos before. max_time: seconds.
        stop_strings: texts that end a row (needs `tokenizer=`). eos_token_id: one id or several.
    Choice
        do_sample: draw from the distribution instead of taking its peak. temperature: divides the logits. top_k: keep
        the k likeliest tokens (0 keeps all). top_p: keep the smallest set with this probability. min_p: keep tokens of
        at least this share of the likeliest one's probability. repetition_penalty: above 1 discourages tokens that are
        already there. seed: makes sampling reproducible; row i then depends on (seed, its own prompt) alone.
    Work
        use_cache; cache_implementation ("dynamic" or "static"); prefill_chunk_size: prompt tokens a pass.
    Outputs
        num_return_sequences; return_dict_in_generate with output_scores (after processing), output_logits (before),
        output_attentions, output_hidden_states.

    Raises:
        GenerationConfigError: a value out of its range; names the field, the value and the range.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    max_time: float | None = None
    stop_strings: str | list[str] | None = None

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    use_cache: bool = True
    cache_implementation: str | None = None
    prefill_chunk_size: int | None = None

    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    # Keys of a file that this version does not read; kept and written back.
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.validate()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def validate(self, vocab_size: int | None = None) -> None:
        """Check every field against its range. Raises GenerationConfigError."""
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            _check(name, value, kind, low, high)
        if self.cache_implementation not in CACHES:
            raise GenerationConfigError(
                f"cache_implementation is {self.cache_implementation!r}; it must be one of "
                f"{', '.join(repr(c) for c in CACHES)}."
            )
        for text in self.stop_texts:
            if not isinstance(text, str) or not text:
                raise GenerationConfigError(
                    f"stop_strings holds {text!r}; each must be a text of at least 1 character."
                )
        self._check_tokens(vocab_size)

    def _check_tokens(self, vocab_size: int | None) -> None:
        below = math.inf if vocab_size is None else vocab_size
        tokens: list[tuple[str, Any]] = [("eos_token_id", t) for t in self.eos_token_ids]
        tokens += [(n, getattr(self, n)) for n in ("pad_token_id", "bos_token_id")]
        for name, token in tokens:
            if token is None or token == -1:  # released files hold -1 for "none"
                continue
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < below:
                limit = "a whole number >= 0" if vocab_size is None else f"in 0..{vocab_size - 1}, the vocabulary"
                raise GenerationConfigError(f"{name} is {token!r}; it must be {limit}.")

    @property
    def stop_texts(self) -> Sequence[str]:
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else self.stop_strings

    # -- changing, in and out --------------------------------------------------------------------------------------

    def updated(self, **values: Any) -> GenerationConfig:
        """A copy with some fields changed. Raises GenerationConfigError for a field that does not exist."""
        names = {f.name for f in fields(self)} - {"extra"}
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise GenerationConfigError(f"generate() has no setting {name!r}.{hint}")
        new = copy.copy(self)
        new.extra = dict(self.extra)
        new.__dict__.update(values)
        new.validate()
        return new

    def update(self, **values: Any) -> dict[str, Any]:
        """Change fields in place; gives back those that are no settings of generate()."""
        names = {f.name for f in fields(self)} - {"extra"}
        self.__dict__.update({k: v for k, v in values.items() if k in names})
        self.validate()
        return {k: v for k, v in values.items() if k not in names}

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> GenerationConfig:
        names = {f.name for f in fields(cls)} - {"extra"}
        known = {k: v for k, v in values.items() if k in names and v is not None}
        unknown = {k: v for k, v in values.items() if k not in names}
        return cls(**{**known, **overrides}, extra=unknown)

    @classmethod
    def from_model_config(cls, config: GemmaConfig) -> GenerationConfig:
        """The defaults with the model's special tokens."""
        tokens = {n: getattr(config, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return cls(**tokens, use_cache=config.use_cache)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **kwargs: Any) -> GenerationConfig:
        """Read generation_config.json of a folder or a Hub id; keyword arguments as in GemmaConfig.from_pretrained."""
        from gemmakit.config import HUB_ARGUMENTS

        where = {k: kwargs.pop(k) for k in HUB_ARGUMENTS if k in kwargs}
        path = find_file(name_or_path, "generation_config.json", **where)
        assert path is not None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{path} is not valid JSON ({e}). Download or export it again.") from e
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds a {type(values).__name__}; a generation_config.json is an object.")
        return cls.from_dict(values, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and what was kept from a file."""
        default = GenerationConfig()
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {**self.extra, **{k: v for k, v in own.items() if v != getattr(default, k)}}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write generation_config.json into `directory`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f".generation_config.json.{os.getpid()}"
        staged.write_text(self.to_json_string(), encoding="utf-8")
        staged.replace(folder / "generation_config.json")

    def __repr__(self) -> str:
        return f"GenerationConfig {self.to_json_string()}"


CACHES = (None, "dynamic", "static")

_WHOLE, _REAL, _FLAG = "a whole number", "a number", "true or false"
# field: kind, lowest, highest; a lowest in a tuple is excluded. Numbers must be finite, so inf means "no limit".
_RANGES: dict[str, tuple[str, Any, float]] = {
    "max_length": (_WHOLE, 1, math.inf),
    "max_new_tokens": (_WHOLE, 1, math.inf),
    "min_length": (_WHOLE, 0, math.inf),
    "min_new_tokens": (_WHOLE, 0, math.inf),
    "max_time": (_REAL, (0.0,), math.inf),
    "temperature": (_REAL, (0.0,), math.inf),
    "top_k": (_WHOLE, 0, math.inf),
    "top_p": (_REAL, 0.0, 1.0),
    "min_p": (_REAL, 0.0, 1.0),
    "repetition_penalty": (_REAL, (0.0,), math.inf),
    "seed": (_WHOLE, 0, 2**63 - 1),
    "prefill_chunk_size": (_WHOLE, 1, math.inf),
    "num_return_sequences": (_WHOLE, 1, math.inf),
    **dict.fromkeys(("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"), (_FLAG, 0, 1)),
}  # fmt: skip
_OPTIONAL = (
    "max_length",
    "max_new_tokens",
    "min_new_tokens",
    "max_time",
    "top_k",
    "min_p",
    "seed",
    "prefill_chunk_size",
)


def _check(name: str, value: Any, kind: str, low: Any, high: float) -> None:
    if kind is _FLAG:
        ok = isinstance(value, bool)
        limit = ""
    else:
        types = (int,) if kind is _WHOLE else (int, float)
        excluded = isinstance(low, tuple)
        floor = low[0] if excluded else low
        ok = isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value)
        ok = ok and value <= high and (value > floor if excluded else value >= floor)
        limit = f" {'>' if excluded else '>='} {floor}" + ("" if high == math.inf else f" and <= {high:g}")
    if not ok:
        raise GenerationConfigError(f"{name} is {value!r}; it must be {kind}{limit}.")
