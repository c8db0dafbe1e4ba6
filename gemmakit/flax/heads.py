"""What stands on the decoder: the language model, one label a sequence, one label a token.

Axis letters: B batch, S positions, D hidden, V vocabulary, C labels. Parameter names are those of released checkpoints.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError, InputError
from gemmakit.family import members
from gemmakit.flax.attention import Wanted, capped
from gemmakit.flax.cache import Cache
from gemmakit.flax.decode.generate import GenerationMixin
from gemmakit.flax.layers import FlaxLinear
from gemmakit.flax.loss import (
    causal_loss,
    check_sequence_labels,
    check_token_labels,
    cross_entropy,
    known,
    next_labels,
    problem_type,
    sequence_loss,
)
from gemmakit.flax.model import FlaxGemmaModule
from gemmakit.flax.pretrained import FlaxGemmaPreTrainedModel
from gemmakit.outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast, TokenClassifierOutput

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# The field's common default where a configuration names none; only token classification drops.
TOKEN_DROPOUT = 0.1


class _OnDecoder(nn.Module):
    """A head's module: the decoder under the name `model`. The fields are `FlaxGemmaModule`'s."""

    config: GemmaConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        self.model = FlaxGemmaModule(self.config, self.dtype, self.scan_layers, self.remat)

    def linear(self, features: int, bias: bool = False) -> FlaxLinear:
        return FlaxLinear(features, self.config.initializer_range, bias, self.dtype)


class FlaxGemmaForCausalLMModule(_OnDecoder):
    """Gemma with the language modelling head, whose weight is the embedding's unless the configuration unties them."""

    def setup(self) -> None:
        super().setup()
        if not self.config.tie_word_embeddings:
            self.lm_head = self.linear(self.config.vocab_size)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: Cache | None = None,
        wanted: Wanted = Wanted(),  # noqa: B008
        is_causal: bool | None = None,
        labels: jax.Array | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """logits_to_keep: 0 for all positions, n for the last n. labels as in `FlaxGemmaForCausalLM.of_head`."""
        if not wanted.hidden_states:
            wanted = replace(wanted, positions=logits_to_keep)
        out = self.model(input_ids, attention_mask, position_ids, cache, wanted, is_causal)
        hidden = out.last_hidden_state[:, -logits_to_keep:]
        c = self.config
        logits = self.model.embed_tokens.attend(hidden) if c.tie_word_embeddings else self.lm_head(hidden)
        logits = capped(logits, c.final_logit_softcapping)
        loss = None
        if labels is not None:
            targets = next_labels(labels, attention_mask, position_ids)
            loss = causal_loss(logits, targets[:, -logits_to_keep:])
        return CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


class FlaxGemmaForSequenceClassificationModule(_OnDecoder):
    """Gemma with a linear head on the right-most token of each row that is not padding."""

    def setup(self) -> None:
        super().setup()
        self.score = self.linear(self.config.num_labels)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: Cache | None = None,
        wanted: Wanted = Wanted(),  # noqa: B008
        is_causal: bool | None = None,
        labels: jax.Array | None = None,
        problem: str | None = None,
    ) -> SequenceClassifierOutputWithPast:
        out = self.model(input_ids, attention_mask, position_ids, cache, wanted, is_causal)
        real = real_tokens(input_ids, attention_mask, self.config.pad_token_id)
        S = input_ids.shape[1]
        places = jnp.full(input_ids.shape[:1], S - 1) if real is None else jnp.argmax(jnp.arange(S) * real, axis=-1)
        # Only the pooled positions are scored: the head is linear, so pooling first is the same and cheaper.
        logits = self.score(jnp.take_along_axis(out.last_hidden_state, places[:, None, None], axis=1)[:, 0])
        loss = None if labels is None else sequence_loss(logits, labels, problem)
        return SequenceClassifierOutputWithPast(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


class FlaxGemmaForTokenClassificationModule(_OnDecoder):
    """Gemma with dropout and a linear head on every token."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.score = self.linear(c.num_labels, c.extra.get("token_classification_bias", True))
        self.dropout = nn.Dropout(token_dropout(c))

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: Cache | None = None,
        wanted: Wanted = Wanted(),  # noqa: B008
        is_causal: bool | None = None,
        labels: jax.Array | None = None,
    ) -> TokenClassifierOutput:
        out = self.model(input_ids, attention_mask, position_ids, cache, wanted, is_causal)
        logits = self.score(self.dropout(out.last_hidden_state, deterministic=not wanted.train))
        loss = None if labels is None else cross_entropy(logits, labels)
        return TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)


class FlaxGemmaForCausalLM(FlaxGemmaPreTrainedModel[CausalLMOutputWithPast], GenerationMixin):
    """Gemma with the language modelling head, tied to the embedding unless the configuration unties them."""

    module_class: ClassVar[type[nn.Module]] = FlaxGemmaForCausalLMModule

    def of_head(
        self, input_ids: Any, attention_mask: Any, *, labels: Any = None, logits_to_keep: int = 0
    ) -> dict[str, Any]:
        """What a call takes besides: logits come back (B, S or fewer, V) in the model's dtype, loss () in float32.

        Args:
            labels: (B, S) ids to predict, shifted inside (position s predicts label s + 1); -100 is ignored, and so
                is what only a padding position or another packed document could predict.
            logits_to_keep: 0 for all positions, n for the last n.

        Raises:
            InputError: labels of another shape, or outside the vocabulary.
        """
        if labels is not None:
            check_token_labels(labels, input_ids, self.config.vocab_size)
        return {"labels": labels, "logits_to_keep": logits_to_keep}


class FlaxGemmaForSequenceClassification(FlaxGemmaPreTrainedModel[SequenceClassifierOutputWithPast]):
    """Gemma with a linear head on the right-most token of each row that is not padding.

    Padding is what a 2-D `attention_mask` hides; without one, every position whose id is `config.pad_token_id`.
    """

    module_class: ClassVar[type[nn.Module]] = FlaxGemmaForSequenceClassificationModule

    def __init__(self, config: GemmaConfig, *args: Any, **kwargs: Any):
        _check_config(config)
        super().__init__(config, *args, **kwargs)

    def of_head(self, input_ids: Any, attention_mask: Any, *, labels: Any = None) -> dict[str, Any]:
        """What a call takes besides: logits come back (B, C) in the model's dtype, loss () in float32.

        Args:
            labels: (B,) class numbers; (B,) or (B, C) real numbers for regression; (B, C) of 0 to 1 for multi-label.
                `config.problem_type` says which; without it one label is regression, whole numbers are classes, and
                real numbers are multi-label.

        Raises:
            InputError: several rows and neither a pad token nor a mask; a row of nothing but padding; labels of
                another shape or out of range.
        """
        problem = None if labels is None else problem_type(self.config, labels)
        if problem is not None:
            check_sequence_labels(labels, problem, np.shape(input_ids)[0], self.config.num_labels)
        _check_padding(input_ids, attention_mask, self.config.pad_token_id)
        return {"labels": labels, "problem": problem}


class FlaxGemmaForTokenClassification(FlaxGemmaPreTrainedModel[TokenClassifierOutput]):
    """Gemma with dropout and a linear head on every token. Its output has no place for a cache."""

    module_class: ClassVar[type[nn.Module]] = FlaxGemmaForTokenClassificationModule

    def __init__(self, config: GemmaConfig, *args: Any, **kwargs: Any):
        _check_config(config)
        super().__init__(config, *args, **kwargs)

    def _drops(self) -> bool:
        return super()._drops() or token_dropout(self.config) > 0

    def of_head(self, input_ids: Any, attention_mask: Any, *, labels: Any = None) -> dict[str, Any]:
        """What a call takes besides: logits come back (B, S, C) in the model's dtype, loss () in float32.

        Args:
            labels: (B, S) class numbers, not shifted; -100 is ignored.
        """
        if labels is not None:
            check_token_labels(labels, input_ids, self.config.num_labels)
        return {"labels": labels}


def token_dropout(config: GemmaConfig) -> float:
    return TOKEN_DROPOUT if config.classifier_dropout is None else config.classifier_dropout


def real_tokens(ids: Any, mask: Any, pad: int | None) -> Any:
    """bool (B, S), True where a position is text; None where nothing says.

    ids: (B, S); mask: (B, past + S) of 0 and 1, or anything else, which says nothing here.
    """
    B, S = np.shape(ids)
    real = None
    if mask is not None and mask.ndim == 2 and mask.shape[0] == B and mask.shape[1] >= S:
        real = mask[:, mask.shape[1] - S :] != 0
    if real is None and pad is not None and pad >= 0:
        real = ids != pad
    return real


def _check_config(config: GemmaConfig) -> None:
    if config.problem_type not in (None, *PROBLEM_TYPES):
        raise ConfigError(f"problem_type is {config.problem_type!r}; it must be one of {', '.join(PROBLEM_TYPES)}.")
    p = config.classifier_dropout
    if p is not None and not (isinstance(p, (int, float)) and not isinstance(p, bool) and 0 <= p < 1):
        raise ConfigError(f"classifier_dropout is {p!r}; it must be a number >= 0 and < 1.")


def _check_padding(ids: Any, mask: Any, pad: int | None) -> None:
    if np.ndim(ids) != 2 or not known(ids, mask):
        return
    real = real_tokens(np.asarray(ids), None if mask is None else np.asarray(mask), pad)
    if real is None:
        if np.shape(ids)[0] > 1:
            raise InputError(
                f"this call has {np.shape(ids)[0]} rows, and nothing says where padding is: config.pad_token_id is not "
                "set and there is no 2-D attention_mask. Pass attention_mask, or one row at a time."
            )
        return
    empty = np.flatnonzero(~np.asarray(real).any(-1))
    if empty.size:
        raise InputError(f"row {empty[0]} of the batch is all padding: it has no token to classify. Leave the row out.")


for _head in (FlaxGemmaForCausalLM, FlaxGemmaForSequenceClassification, FlaxGemmaForTokenClassification):
    globals().update(members(_head))
