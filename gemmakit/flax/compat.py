"""Names of transformers' Flax for what gemmakit has under its own: `from gemmakit import FlaxTopKLogitsWarper`.

Processors are called with ids (R, n), scores (R, V) and how many of the ids are there, and go to generate() as
`logits_processor=`; the settings of the same meaning do the same. Equal ones share compiled code.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemmakit.checks import Whole, check
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.flax.decode import processors
from gemmakit.flax.heads import FlaxGemmaForCausalLM
from gemmakit.generation.settings import check_filter_value, in_range


class FlaxAutoModelForCausalLM:
    """`FlaxGemmaForCausalLM`: next tokens, in JAX."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `FlaxGemmaForCausalLM.from_pretrained`."""
        return FlaxGemmaForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: GemmaConfig, **kwargs: Any) -> Any:
        """A model with fresh weights."""
        return FlaxGemmaForCausalLM(config, **kwargs)


class FlaxLogitsProcessor:
    """What changes the scores of a step; a class of one's own gives `__call__`."""

    def __init__(self, *settings: Any):
        """settings: what two processors of one class are compared by."""
        self._settings = settings

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self._settings))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
        """input_ids: (R, n), of which `cur_len` are there; scores: (R, V) -> (R, V)."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__ of its own.")


class FlaxLogitsWarper(FlaxLogitsProcessor):
    """The same, of those that shape a distribution to be sampled from."""


class FlaxLogitsProcessorList(list[Any]):
    """Processors one after another."""

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any, **kwargs: Any) -> jax.Array:
        """As a FlaxLogitsProcessor. kwargs: passed to each."""
        for processor in self:
            scores = processor(input_ids, scores, cur_len, **kwargs)
        return scores


class FlaxTemperatureLogitsWarper(FlaxLogitsWarper):
    """Logits divided by the temperature."""

    def __init__(self, temperature: float):
        super().__init__(in_range("temperature", temperature))
        self.temperature = temperature

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
        return scores / self.temperature


class FlaxTopKLogitsWarper(FlaxLogitsWarper):
    """The likeliest k."""

    def __init__(self, top_k: int, filter_value: float = processors.FORBIDDEN, min_tokens_to_keep: int = 1):
        check_filter_value(filter_value)
        check("min_tokens_to_keep", min_tokens_to_keep, Whole(1), InputError)
        self.top_k = max(in_range("top_k", top_k), min_tokens_to_keep)
        super().__init__(self.top_k)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
        return processors.top_k(scores, self.top_k)


class FlaxTopPLogitsWarper(FlaxLogitsWarper):
    """The likeliest tokens that make up the share p."""

    def __init__(self, top_p: float, filter_value: float = processors.FORBIDDEN, min_tokens_to_keep: int = 1):
        check_filter_value(filter_value)
        check("min_tokens_to_keep", min_tokens_to_keep, Whole(1), InputError)
        super().__init__(in_range("top_p", top_p), min_tokens_to_keep)
        self.top_p, self.min_tokens_to_keep = top_p, min_tokens_to_keep

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
        return processors.top_p(scores, self.top_p, self.min_tokens_to_keep)


class FlaxMinLengthLogitsProcessor(FlaxLogitsProcessor):
    """No eos before `min_length` tokens, prompt included."""

    def __init__(self, min_length: int, eos_token_id: int):
        super().__init__(in_range("min_length", min_length), eos_token_id)
        self.min_length, self.eos_token_id = min_length, eos_token_id

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
        return jnp.where(cur_len < self.min_length, processors.without(scores, (self.eos_token_id,)), scores)


class FlaxForceTokensLogitsProcessor(FlaxLogitsProcessor):
    """{place: the token that comes there}; a place is how many tokens are there before."""

    def __init__(self, force_token_map: Mapping[int, int] | Sequence[tuple[int, int]]):
        self.force_token_map = dict(force_token_map)
        super().__init__(tuple(sorted(self.force_token_map.items())))

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
        for place, token in self.force_token_map.items():
            scores = jnp.where(cur_len == place, processors.only(scores, (token,)), scores)
        return scores


class FlaxForcedBOSTokenLogitsProcessor(FlaxForceTokensLogitsProcessor):
    """The token that follows the first."""

    def __init__(self, bos_token_id: int):
        super().__init__({1: bos_token_id})


class FlaxForcedEOSTokenLogitsProcessor(FlaxForceTokensLogitsProcessor):
    """The last of `max_length` tokens."""

    def __init__(self, max_length: int, eos_token_id: int):
        super().__init__({max_length - 1: eos_token_id})


class FlaxSuppressTokensLogitsProcessor(FlaxLogitsProcessor):
    """Tokens that never come."""

    def __init__(self, suppress_tokens: Sequence[int]):
        self.suppress_tokens = tuple(suppress_tokens)
        super().__init__(self.suppress_tokens)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
        return processors.without(scores, self.suppress_tokens)


class FlaxSuppressTokensAtBeginLogitsProcessor(FlaxLogitsProcessor):
    """Tokens that do not come when there are `begin_index`."""

    def __init__(self, begin_suppress_tokens: Sequence[int], begin_index: int):
        self.begin_suppress_tokens, self.begin_index = tuple(begin_suppress_tokens), begin_index
        super().__init__(self.begin_suppress_tokens, begin_index)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
        return jnp.where(cur_len == self.begin_index, processors.without(scores, self.begin_suppress_tokens), scores)


class FlaxNoRepeatNGramLogitsProcessor(FlaxLogitsProcessor):
    """No n-gram of this size comes twice. Padding counts as tokens: the setting no_repeat_ngram_size knows better."""

    def __init__(self, ngram_size: int):
        check("ngram_size", ngram_size, Whole(1), InputError)
        super().__init__(ngram_size)
        self.ngram_size = ngram_size

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: Any) -> jax.Array:
        there = jnp.broadcast_to(jnp.arange(input_ids.shape[1]) < cur_len, input_ids.shape)
        return processors.without_repeats(scores, self.ngram_size, input_ids, there, cur_len)


__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    name for name, value in list(globals().items()) if inspect.isclass(value) and value.__module__ == __name__
]
