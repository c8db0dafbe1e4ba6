"""GenerationConfig: the settings of generate(), what they mean together, and their file."""

from __future__ import annotations

import copy
import difflib
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from gemmakit.checks import Real, TokenIds, Whole, check_fields, is_whole, ranges
from gemmakit.config import GemmaConfig
from gemmakit.errors import GenerationConfigError, PromptTooLong, TokenOutOfRange
from gemmakit.files import read_json_object, write_text
from gemmakit.generation import rules
from gemmakit.generation.settings import DEFAULTS, REFUSED, Settings
from gemmakit.generation.watermarks import BaseWatermarkingConfig, watermark_of
from gemmakit.hub import HubOptions, find_file, push_folder, push_saved

T = TypeVar("T")
FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 20


def _refuses_unknown(cls: type[T]) -> type[T]:
    """A misspelt setting is told from a wrong call: by name, with the nearest setting there is."""
    plain = cls.__init__

    @functools.wraps(plain)
    def init(self: Any, **settings: Any) -> None:
        refuse_unknown(settings, {*DEFAULTS, "extra"})
        plain(self, **settings)

    cls.__init__ = init
    return cls


@_refuses_unknown
@dataclass(repr=False, kw_only=True)
class GenerationConfig(Settings):
    """Settings of generate(). What a call gives wins over the model's own, which win over these defaults.

    None means the default (for top_k, no limit). Settings that only sampling or beam search reads are warned of
    where neither is on.

    Length
        max_length: prompt and new tokens together. max_new_tokens: new tokens alone, wins over max_length; with
        neither, 20 new tokens. min_length, min_new_tokens: no eos before; the second wins as well.
        max_time: seconds. stop_strings: texts that end a row (needs `tokenizer=`). eos_token_id: one id or several.
    Strategy
        do_sample: draw from the distribution instead of taking its peak. num_beams: rows searched side by side;
        early_stopping (True, False or "never"), length_penalty (above 0 favours long rows). num_beam_groups with
        diversity_penalty: groups of beams kept apart (arXiv:1610.02424). constraints, force_words_ids: what a beam must
        hold. penalty_alpha with top_k: contrastive search (arXiv:2202.06417), with low_memory one candidate at a time.
        Assisted (arXiv:2211.17192): num_assistant_tokens a draft, their schedule, assistant_confidence_threshold,
        is_assistant; prompt_lookup_num_tokens with max_matching_ngram_size drafts from the prompt.
    Choice of a token
        temperature divides the logits. top_k keeps the k likeliest tokens (0: all); top_p the smallest set of this
        probability (arXiv:1904.09751); min_p tokens of at least this share of the likeliest one's (arXiv:2407.01082);
        top_h this share of the entropy (arXiv:2509.02510); typical_p the most typical ones (arXiv:2202.00666);
        epsilon_cutoff and eta_cutoff those above a floor (arXiv:2210.15191). seed: row i depends on (seed, its prompt).
        repetition_penalty above 1 discourages tokens that are there (arXiv:1909.05858); encoder_repetition_penalty
        above 1 encourages those of the prompt. no_repeat_ngram_size: n-grams that may not come twice;
        encoder_no_repeat_ngram_size: not again from the prompt. bad_words_ids, suppress_tokens, begin_suppress_tokens:
        forbidden sequences, tokens, first tokens. sequence_bias: {(ids): added to the last one's logit}.
        forced_bos_token_id (a prompt of one token), forced_eos_token_id (the last place).
        exponential_decay_length_penalty: (new tokens, factor). guidance_scale: weight of the prompt against
        `negative_prompt_ids` (arXiv:2306.17806). remove_invalid_values: NaN and infinity become finite.
        renormalize_logits: scores end as log probabilities. watermarking_config. token_healing: regrow the prompt's
        last token. json_schema, regex (Rust's syntax), grammar (Lark): the shape of the new text (needs `tokenizer=`).
    Work
        use_cache; cache_implementation with cache_config and max_cache_len; prefill_chunk_size: prompt tokens a pass.
        cuda_graphs: replay a step instead of starting its kernels one by one, where a GPU and the settings allow it.
        speculate: let a row check several tokens a step where its own text proposes them, it pays, and no bit changes.
    Outputs
        num_return_sequences; return_dict_in_generate with output_scores (after processing), output_logits (before),
        output_attentions, output_hidden_states.

    Raises:
        GenerationConfigError: a value out of its range; names the field, the value and the range.
        TokenOutOfRange: a token id outside the vocabulary, in validate(vocab_size).
    """

    # Settings out of range that a file holds and nothing reads: they are an error once something does.
    _from_file: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        self.validate()
        rules.warn_of_no_effect(self)

    # -- what the settings mean ------------------------------------------------------------------------------------

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All eos ids; a file's -1, which means none, is not among them."""
        eos = self.eos_token_id
        listed = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
        return tuple(token for token in listed if token >= 0)

    @property
    def stop_texts(self) -> Sequence[str]:
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else self.stop_strings

    @property
    def biases(self) -> dict[tuple[int, ...], float]:
        """sequence_bias by token sequence; empty when there is none. validate() made it a dictionary."""
        return self.sequence_bias if isinstance(self.sequence_bias, dict) else {}

    @property
    def watermark(self) -> BaseWatermarkingConfig | None:
        return self.watermarking_config if isinstance(self.watermarking_config, BaseWatermarkingConfig) else None

    @property
    def filler(self) -> int:
        """What fills rows that end before the others: the pad token, else an eos, else 0."""
        if self.pad_token_id is not None and self.pad_token_id >= 0:
            return self.pad_token_id
        return self.eos_token_ids[0] if self.eos_token_ids else 0

    def new_tokens(self, context: int, prompt: int, longest: int) -> tuple[int, str]:
        """New tokens a row may get, at least 1, and in words why so many.

        context: positions of the model. prompt: places of a row that are taken; longest: those of them without padding.
        Raises PromptTooLong where they do not fit.
        """
        if self.max_new_tokens is not None:
            new, asked = self.max_new_tokens, f"max_new_tokens is {self.max_new_tokens}"
        elif self.max_length is not None:
            new, asked = self.max_length - prompt, f"max_length is {self.max_length}"
            if new < 1:
                raise PromptTooLong(
                    f"prompt has {prompt} tokens and max_length is {self.max_length}, which counts the prompt: "
                    "raise max_length, or use max_new_tokens."
                )
        else:
            new = max(1, min(DEFAULT_NEW_TOKENS, context - prompt))
            asked = f"{new} new tokens are asked for"
        if longest + new > context:
            room = context - longest
            remedy = f", or ask for at most {room} new tokens" if room > 0 else f" to fewer than {context} tokens"
            raise PromptTooLong(
                f"prompt has {longest} tokens and {asked}, but the context holds {context}. Shorten the prompt{remedy}."
            )
        return new, asked

    def get_generation_mode(self, assistant_model: Any = None) -> str:
        """The strategy these settings choose, by the name transformers gives it."""
        if self.constraints is not None or self.force_words_ids is not None:
            return "constrained_beam_search"
        if self.num_beams > 1:
            if self.num_beam_groups > 1:
                return "group_beam_search"
            return "beam_sample" if self.do_sample else "beam_search"
        if assistant_model is not None or self.prompt_lookup_num_tokens is not None:
            return "assisted_generation"
        if self.do_sample:
            return "sample"
        return "contrastive_search" if self.penalty_alpha and self.top_k and self.top_k > 1 else "greedy_search"

    # -- checking --------------------------------------------------------------------------------------------------

    def validate(self, vocab_size: int | None = None, strict: bool = True) -> None:
        """Check every field; strict is accepted, there is no laxer check.

        Raises GenerationConfigError, and with a vocabulary size TokenOutOfRange.
        """
        self._settle()
        unread = self._from_file.intersection(rules.unread(lambda name: getattr(self, name)))
        try:
            check_fields(self, GenerationConfigError, skip=unread)
        except GenerationConfigError as e:
            if not any(str(e).startswith(f"{name} is ") for name in self._from_file):
                raise
            raise GenerationConfigError(f"{e} The model's own settings say so: give another.") from None
        for name, allowed in ranges(Settings).items():
            if isinstance(allowed, TokenIds) and getattr(self, name) is not None:
                _check_tokens(name, allowed.ids(getattr(self, name)), vocab_size)
        _check_tokens("sequence_bias", (token for sequence in self.biases for token in sequence), vocab_size)
        if not isinstance(self.stop_texts, str | list | tuple):
            raise GenerationConfigError(f"stop_strings is {self.stop_strings!r}; it must be a text or a list of texts.")
        for text in self.stop_texts:
            if not isinstance(cast(Any, text), str) or not text:  # a file can hold anything
                raise GenerationConfigError(
                    f"stop_strings holds {text!r}; each must be a text of at least 1 character."
                )
        rules.refuse_contradictions(self)

    def _settle(self) -> None:
        """One form of each value: None is the default, and files' lists and dictionaries become what they stand for."""
        if self.top_k is None:
            self.top_k = 0
        for name, default in DEFAULTS.items():
            if default is not None and getattr(self, name) is None:
                setattr(self, name, default)
        if self.bad_words_ids is not None and not self.bad_words_ids:
            raise GenerationConfigError("bad_words_ids is empty: give at least 1 list of token ids, or leave it out.")
        if self.sequence_bias is not None:
            self.sequence_bias = _biases(self.sequence_bias)
        if self.exponential_decay_length_penalty is not None:
            self.exponential_decay_length_penalty = _decay(self.exponential_decay_length_penalty)
        if self.watermarking_config is not None:
            self.watermarking_config = watermark_of(self.watermarking_config)
        if hasattr(self.json_schema, "model_json_schema"):  # a pydantic model
            self.json_schema = self.json_schema.model_json_schema()  # type: ignore[union-attr]

    # -- changing, in and out --------------------------------------------------------------------------------------

    def updated(self, **values: Any) -> GenerationConfig:
        """A copy with some fields changed. Raises GenerationConfigError for a field that does not exist."""
        refuse_unknown(values, DEFAULTS)
        new = copy.copy(self)
        new.extra = dict(self.extra)
        new.__dict__.update(values, _from_file=self._from_file.difference(values))
        new.validate()
        rules.warn_of_no_effect(new, values)
        return new

    def update(self, **values: Any) -> dict[str, Any]:
        """Change fields in place, all or none; gives back those that are no settings of generate()."""
        known = {k: v for k, v in values.items() if k in DEFAULTS}
        self.__dict__.update(vars(self.updated(**known)))
        return {k: v for k, v in values.items() if k not in DEFAULTS}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """From a file's keys; those that are no settings go to `extra`. Overrides that are none are refused, or with
        return_unused_kwargs given back beside the result."""
        known = {k: v for k, v in config_dict.items() if k in DEFAULTS and v is not None}
        unknown = {k: v for k, v in config_dict.items() if k not in DEFAULTS}
        for name in REFUSED:
            if unknown.get(name) is not None:
                warnings.warn(f"{name} is kept but does nothing: {REFUSED[name]}.", stacklevel=3)
        unused = {k: v for k, v in overrides.items() if return_unused_kwargs and k not in DEFAULTS}
        overrides = {k: v for k, v in overrides.items() if k not in unused}
        asked = {**DEFAULTS, **known, **overrides}
        kept = {
            name: known.pop(name)
            for name in rules.unread(asked.__getitem__)
            if name in known and name not in overrides and not ranges(Settings)[name].holds(known[name])
        }
        config = cls(**{**known, **overrides}, extra=unknown)
        config.__dict__.update(kept, _from_file=frozenset(kept))
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_model_config(cls, model_config: GemmaConfig) -> GenerationConfig:
        """The defaults with the model's special tokens, and the settings that an older config.json holds."""
        tokens = {n: getattr(model_config, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
        older = {n: v for n, v in model_config.extra.items() if n in DEFAULTS}
        return cls.from_dict(older, **tokens, use_cache=model_config.use_cache)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], config_file_name: str = FILE, **kwargs: Any
    ) -> Any:
        """Read generation_config.json of a folder or a Hub id; keyword arguments as in GemmaConfig.from_pretrained."""
        path = find_file(pretrained_model_name, config_file_name, HubOptions.take(kwargs))
        assert path is not None
        try:
            return cls.from_dict(read_json_object(path), **kwargs)
        except GenerationConfigError as e:
            raise GenerationConfigError(f"{path}: {e}") from None

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and what was kept from a file; as a file holds it."""
        out = {**self.extra, **{k: getattr(self, k) for k, v in DEFAULTS.items() if getattr(self, k) != v}}
        if self.biases:  # JSON has no tuples for keys
            out["sequence_bias"] = [[list(ids), bias] for ids, bias in self.biases.items()]
        if self.watermark is not None:
            out["watermarking_config"] = self.watermark.to_dict()
        return out

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict` as indented JSON, with sorted keys and a line end; use_diff is accepted."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=_plain) + "\n"

    to_diff_dict = to_dict

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_dict` as one file, which a reader finds whole."""
        write_text(Path(json_file_path), self.to_json_string())

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload generation_config.json; kwargs go to `gemmakit.hub.push_folder`. The address comes back."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        config_file_name: str = FILE,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write generation_config.json into a folder; push_to_hub: upload it, kwargs say how."""
        write_text(Path(save_directory) / config_file_name, self.to_json_string())
        push_saved(Path(save_directory), push_to_hub, kwargs)

    def __repr__(self) -> str:
        return f"GenerationConfig {json.dumps(self.to_dict(), indent=2, sort_keys=True, default=repr)}"


def refuse_unknown(given: Collection[str], names: Collection[str]) -> None:
    """Raises GenerationConfigError for what is not among the names, with the nearest of them."""
    for name in given:
        if name in names:
            continue
        if name in REFUSED:
            raise GenerationConfigError(f"generate() has no setting {name!r} here: {REFUSED[name]}.")
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise GenerationConfigError(f"generate() has no setting {name!r}.{hint}")


def _check_tokens(name: str, tokens: Iterable[Any], vocab_size: int | None) -> None:
    for token in tokens:
        if not is_whole(token) or token < 0:
            raise GenerationConfigError(f"{name} holds the token id {token!r}; it must be a whole number >= 0.")
        if vocab_size is not None and token >= vocab_size:
            raise TokenOutOfRange(
                f"{name} holds the token id {token}, which is outside the vocabulary of {vocab_size} ids "
                f"(0 to {vocab_size - 1})."
            )


def _biases(value: Any) -> dict[tuple[int, ...], float]:
    """From {(ids): bias}, or the [[ids, bias], ...] of a file, or the "(1, 2)" keys that JSON makes of tuples."""
    pairs: Any = cast("dict[Any, Any]", value).items() if isinstance(value, dict) else value
    try:
        out: dict[tuple[Any, ...], Any] = {_sequence(ids): bias for ids, bias in pairs}
    except (TypeError, ValueError):
        out = {}
    if not out or any(not ids for ids in out) or not all(Real().holds(b) or b == -float("inf") for b in out.values()):
        raise GenerationConfigError(
            f"sequence_bias is {value!r}; it must be {{(token ids): finite number}} or [[[token ids], number], ...]."
        )
    return {ids: float(bias) for ids, bias in out.items()}


def _sequence(ids: Any) -> tuple[Any, ...]:
    if isinstance(ids, str) and re.fullmatch(r"\(?[\d\s,]+\)?", ids):
        return tuple(int(number) for number in re.findall(r"\d+", ids))
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _decay(value: Any) -> tuple[int, float]:
    if isinstance(value, list | tuple) and len(cast("list[Any]", value)) == 2:
        start, factor = cast("tuple[Any, Any]", value)
        if Whole(0).holds(start) and Real(0, above=True).holds(factor):
            return start, factor
    raise GenerationConfigError(
        f"exponential_decay_length_penalty is {value!r}; it must be (new tokens before it, factor > 0)."
    )


def _plain(value: Any) -> Any:
    """JSON for a number of numpy; other objects live in this process alone."""
    if hasattr(value, "item"):
        return value.item()
    raise GenerationConfigError(f"{value!r} cannot be written to a file: pass it to generate() instead.")
