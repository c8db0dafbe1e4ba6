"""Every setting of generate(), each once: its type, its range and its default. Data; no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from gemmakit.checks import FLAG, TEXT, Instance, OneOf, Real, TokenIds, Whole, check, ranges
from gemmakit.errors import InputError
from gemmakit.generation.watermarks import BaseWatermarkingConfig

CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "quantized", "hybrid",
          "hybrid_chunked", "sliding_window")  # fmt: skip
SCHEDULES = ("constant", "heuristic", "heuristic_transient")
_SHARE = Real(0, 1)
_CUTOFF = Real(0, 1, below=True)
# What divides scores, or multiplies them: beyond these, float32 has infinities for the scores of any model.
_FACTOR = Real(1e-10, 1e10)
_TEMPERATURE = Real(1e-10, 1e10, remedy="; for the likeliest token always, set do_sample=False")
_CONSTRAINTS = Instance((list, tuple), "a list of at least 1 constraint")
_SCHEMA = Instance((dict, str, bool), "a JSON schema: a dictionary, its text, or true")
_ARGUMENTS = Instance((dict,), "a dictionary of the cache's own arguments")
_TOKEN = TokenIds(0, absent=True)

# Settings of transformers that Gemma, or this library, has no use for: a call that gives one is told why.
REFUSED: dict[str, str] = {
    "decoder_start_token_id": "Gemma has no encoder; a decoder-only prompt starts with bos_token_id",
    "dola_layers": "contrasting layers (DoLa) is not among the strategies here",
    "use_mtp": "Gemma has no multi-token prediction heads",
    "speculation_type": "use assistant_model=, prompt_lookup_num_tokens= or speculate=",
    "assistant_early_exit": "Gemma's inner layers were not trained to predict tokens; use assistant_model=",
    "assistant_lookbehind": "the assistant must share the tokenizer",
    "target_lookbehind": "the assistant must share the tokenizer",
    "assistant_ensemble_weight": "assisted decoding here never changes the distribution",
    "compile_config": "compile the model itself, with torch.compile",
    "disable_compile": "generate() compiles nothing of its own accord (cuda_graphs=False turns captured steps off)",
    "continuous_batching_config": "give its settings to generate_batch()",
}


@dataclass(repr=False, kw_only=True)
class Settings:
    """The fields of `GenerationConfig`, which says what they mean. None is the default where a type lacks it."""

    max_length: Annotated[int | None, Whole(1)] = None
    max_new_tokens: Annotated[int | None, Whole(1)] = None
    min_length: Annotated[int, Whole(0)] = 0
    min_new_tokens: Annotated[int | None, Whole(0)] = None
    max_time: Annotated[float | None, Real(0, above=True)] = None
    stop_strings: str | list[str] | None = None

    do_sample: Annotated[bool, FLAG] = False
    num_beams: Annotated[int, Whole(1)] = 1
    early_stopping: Annotated[bool | str, OneOf(True, False, "never")] = False
    length_penalty: Annotated[float, Real()] = 1.0
    num_beam_groups: Annotated[int, Whole(1)] = 1
    diversity_penalty: Annotated[float, Real(0)] = 0.0
    constraints: Annotated[Sequence[Any] | None, _CONSTRAINTS] = None
    force_words_ids: Annotated[list[list[int]] | list[list[list[int]]] | None, TokenIds(2, 3)] = None
    penalty_alpha: Annotated[float | None, _SHARE] = None
    low_memory: Annotated[bool, FLAG] = False

    is_assistant: Annotated[bool, FLAG] = False
    num_assistant_tokens: Annotated[int, Whole(1)] = 20
    num_assistant_tokens_schedule: Annotated[str, OneOf(*SCHEDULES)] = "constant"
    assistant_confidence_threshold: Annotated[float, _SHARE] = 0.4
    prompt_lookup_num_tokens: Annotated[int | None, Whole(1)] = None
    max_matching_ngram_size: Annotated[int | None, Whole(1)] = None

    temperature: Annotated[float, _TEMPERATURE] = 1.0
    top_k: Annotated[int | None, Whole(0)] = 50
    top_p: Annotated[float, _SHARE] = 1.0
    min_p: Annotated[float | None, _SHARE] = None
    top_h: Annotated[float | None, Real(0, 1, above=True)] = None
    typical_p: Annotated[float, Real(0, 1, above=True)] = 1.0
    epsilon_cutoff: Annotated[float, _CUTOFF] = 0.0
    eta_cutoff: Annotated[float, _CUTOFF] = 0.0
    seed: Annotated[int | None, Whole(0, 2**63 - 1)] = None

    repetition_penalty: Annotated[float, _FACTOR] = 1.0
    encoder_repetition_penalty: Annotated[float, _FACTOR] = 1.0
    no_repeat_ngram_size: Annotated[int, Whole(0)] = 0
    encoder_no_repeat_ngram_size: Annotated[int, Whole(0)] = 0
    bad_words_ids: Annotated[list[list[int]] | None, TokenIds(2)] = None
    suppress_tokens: Annotated[list[int] | None, TokenIds(1)] = None
    begin_suppress_tokens: Annotated[list[int] | None, TokenIds(1)] = None
    sequence_bias: dict[tuple[int, ...], float] | list[Any] | None = None
    forced_bos_token_id: Annotated[int | None, TokenIds(0)] = None
    forced_eos_token_id: Annotated[int | list[int] | None, TokenIds(0, 1)] = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    guidance_scale: Annotated[float | None, Real()] = None
    remove_invalid_values: Annotated[bool, FLAG] = False
    renormalize_logits: Annotated[bool, FLAG] = False
    watermarking_config: BaseWatermarkingConfig | dict[str, Any] | None = None
    token_healing: Annotated[bool, FLAG] = False
    json_schema: Annotated[dict[str, Any] | str | bool | None, _SCHEMA] = None
    regex: Annotated[str | None, TEXT] = None
    grammar: Annotated[str | None, TEXT] = None

    use_cache: Annotated[bool, FLAG] = True
    cache_implementation: Annotated[str | None, OneOf(*CACHES)] = None
    cache_config: Annotated[dict[str, Any] | None, _ARGUMENTS] = None
    max_cache_len: Annotated[int | None, Whole(1)] = None
    prefill_chunk_size: Annotated[int | None, Whole(1)] = None
    cuda_graphs: Annotated[bool, FLAG] = True
    speculate: Annotated[bool, FLAG] = True

    num_return_sequences: Annotated[int, Whole(1)] = 1
    return_dict_in_generate: Annotated[bool, FLAG] = False
    output_scores: Annotated[bool, FLAG] = False
    output_logits: Annotated[bool, FLAG] = False
    output_attentions: Annotated[bool, FLAG] = False
    output_hidden_states: Annotated[bool, FLAG] = False

    pad_token_id: Annotated[int | None, _TOKEN] = None
    bos_token_id: Annotated[int | None, _TOKEN] = None
    eos_token_id: Annotated[int | list[int] | None, TokenIds(0, 1, absent=True)] = None

    # Keys of a file that this version does not read; kept and written back.
    extra: dict[str, Any] = field(default_factory=dict[str, Any])


DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Settings) if f.name != "extra"}


def in_range(setting: str, value: Any) -> Any:
    """A value that this setting may have. Raises InputError for another."""
    check(setting, value, ranges(Settings)[setting], InputError)
    return value


def check_filter_value(filter_value: float) -> None:
    """Raises InputError for another score of what is left out than -inf, the one that processors give here."""
    if filter_value != float("-inf"):
        raise InputError(f"filter_value is {filter_value!r}; what is left out gets -inf here: leave it out.")
