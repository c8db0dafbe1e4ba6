"""Classification heads: one label a sequence, one label a token.

Axis letters: B batch, S positions, D hidden, C labels. Parameter names are those of the PyTorch classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError, InputError
from gemmakit.flax.cache import Cache
from gemmakit.flax.layers import FlaxLinear
from gemmakit.flax.model import FlaxGemmaModule
from gemmakit.flax.pretrained import FlaxGemmaPreTrainedModel
from gemmakit.flax.static import Wanted
from gemmakit.flax.training import check_classes, check_token_labels, cross_entropy, known
from gemmakit.outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# The field's common default where a configuration names none; only token classification drops.
TOKEN_DROPOUT = 0.1


class FlaxGemmaForSequenceClassificationModule(nn.Module):
    """Gemma with a linear head on the right-most token of each row that is not padding."""

    config: GemmaConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.model = FlaxGemmaModule(c, self.dtype, self.scan_layers, self.remat)
        self.score = FlaxLinear(c.num_labels, c.initializer_range, dtype=self.dtype)

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


class FlaxGemmaForTokenClassificationModule(nn.Module):
    """Gemma with dropout and a linear head on every token."""

    config: GemmaConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.model = FlaxGemmaModule(c, self.dtype, self.scan_layers, self.remat)
        biased = c.extra.get("token_classification_bias", True)
        self.score = FlaxLinear(c.num_labels, c.initializer_range, biased, self.dtype)
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


class FlaxGemmaForSequenceClassification(FlaxGemmaPreTrainedModel):
    """Gemma with a linear head on the right-most token of each row that is not padding."""

    module_class: ClassVar[type[nn.Module]] = FlaxGemmaForSequenceClassificationModule

    def __init__(self, config: GemmaConfig, *args: Any, **kwargs: Any):
        _check_config(config)
        super().__init__(config, *args, **kwargs)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Cache | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        labels: Any = None,
        is_causal: bool | None = None,
        lora: Any = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Run the decoder and score each row once; arguments as in `FlaxGemmaModel.__call__`, and:

        Padding is every position that a 2-D `attention_mask` hides or whose id is `config.pad_token_id`.

        Args:
            labels: (B,) class numbers; (B,) or (B, C) real numbers for regression; (B, C) of 0 to 1 for multi-label.
                `config.problem_type` says which; without it one label is regression, whole numbers are classes, and
                real numbers are multi-label.

        Returns:
            SequenceClassifierOutputWithPast with logits (B, C) in the model's dtype and loss () in float32.

        Raises:
            InputError: several rows and neither a pad token nor a mask; a row of nothing but padding; labels of
                another shape or out of range.
        """
        problem = None
        if labels is not None:
            problem = _problem_type(self.config, labels)
            _check_sequence_labels(labels, problem, np.shape(input_ids)[0], self.config.num_labels)
        _check_padding(input_ids, attention_mask, self.config.pad_token_id)
        return self._run(
            input_ids,
            attention_mask,
            position_ids,
            params,
            past_key_values,
            dropout_rng,
            train,
            output_attentions,
            output_hidden_states,
            return_dict,
            lora=lora,
            labels=labels,
            is_causal=is_causal,
            problem=problem,
        )


class FlaxGemmaForTokenClassification(FlaxGemmaPreTrainedModel):
    """Gemma with dropout and a linear head on every token."""

    module_class: ClassVar[type[nn.Module]] = FlaxGemmaForTokenClassificationModule

    def __init__(self, config: GemmaConfig, *args: Any, **kwargs: Any):
        _check_config(config)
        super().__init__(config, *args, **kwargs)

    def _drops(self) -> bool:
        return super()._drops() or token_dropout(self.config) > 0

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Cache | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        labels: Any = None,
        is_causal: bool | None = None,
        lora: Any = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Run the decoder and score each token; arguments as in `FlaxGemmaModel.__call__`, and:

        Args:
            labels: (B, S) class numbers, not shifted; -100 is ignored.

        Returns:
            TokenClassifierOutput with logits (B, S, C) in the model's dtype and loss () in float32. It has no place for
            a cache.
        """
        if labels is not None:
            labels = check_token_labels(labels, input_ids, self.config.num_labels)
        return self._run(
            input_ids,
            attention_mask,
            position_ids,
            params,
            past_key_values,
            dropout_rng,
            train,
            output_attentions,
            output_hidden_states,
            return_dict,
            lora=lora,
            labels=labels,
            is_causal=is_causal,
        )


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
    if pad is not None and pad >= 0:
        real = (ids != pad) if real is None else real & (ids != pad)
    return real


def sequence_loss(logits: jax.Array, labels: jax.Array, problem: str | None) -> jax.Array:
    """Mean squared error, cross entropy or binary cross entropy by `problem`, in float32. logits: (B, C)."""
    if problem == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    logits = logits.astype(jnp.float32)
    target = labels.astype(jnp.float32).reshape(logits.shape)
    if problem == "regression":
        return jnp.mean((logits - target) ** 2)
    return jnp.mean(jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits))))


def _problem_type(config: GemmaConfig, labels: Any) -> str:
    """What the configuration says, or what the labels look like; the guess is not written down in the config."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    dtype = labels.dtype if hasattr(labels, "dtype") else np.asarray(labels).dtype
    return "single_label_classification" if jnp.issubdtype(dtype, jnp.integer) else "multi_label_classification"


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


def _check_sequence_labels(labels: Any, problem: str, batch: int, classes: int) -> None:
    flat_shapes = [(batch,), (batch, 1)]
    allowed = flat_shapes if problem == "single_label_classification" or classes == 1 else [(batch, classes)]
    if tuple(np.shape(labels)) not in allowed:
        raise InputError(f"labels has shape {tuple(np.shape(labels))}; it must be {' or '.join(map(str, allowed))}.")
    if problem == "single_label_classification":
        check_classes(labels, classes)
        return
    if not known(labels):
        return
    values = np.asarray(labels, np.float32)
    low, high = (-np.inf, np.inf) if problem == "regression" else (0.0, 1.0)
    bad = values[~(np.isfinite(values) & (values >= low) & (values <= high))]
    if bad.size:
        limit = "a finite number" if problem == "regression" else "from 0 to 1"
        raise InputError(f"label {bad[0]} is out of range; for {problem} each must be {limit}.")
