"""What models are trained by: the losses of the heads, in float32, and the checks of their labels.

Axis letters: B batch, S positions, V vocabulary, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.flax.masks import packed_documents

IGNORED_LABEL = -100


def known(*arrays: Any) -> bool:
    """Whether the numbers can be looked at: inside jit, grad and vmap they cannot."""
    return not any(isinstance(a, Tracer) for a in arrays)


def check_array(name: str, value: Any, call: str) -> None:
    """Raises InputError for what holds arrays by name; a tokenizer's whole result is the commonest of these."""
    if isinstance(value, Mapping):
        raise InputError(f"{name} is a {type(value).__name__}; it must be an array: unpack it, as in {call}(**{name}).")


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over targets that are not -100, in float32. logits: (..., V); targets: (...)."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    counted = targets != IGNORED_LABEL
    chosen = jnp.take_along_axis(logprobs, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counted, chosen, 0.0)) / counted.sum()


def causal_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy in float32. logits: (B, S, V); targets: (B, S), the id that follows each position, or -100."""
    return cross_entropy(logits, targets)


def next_labels(
    labels: jax.Array, attention_mask: jax.Array | None = None, position_ids: jax.Array | None = None
) -> jax.Array:
    """What each position is to predict: the label after it, or -100. The last has none. labels: (B, S).

    attention_mask: where it is 2-D, (B, past + S), a position that it hides predicts nothing. position_ids: the
    last token of a packed document does not predict the next document's first, as `packed_documents` tells them apart.
    """
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    shown = None
    if attention_mask is not None and attention_mask.ndim == 2:
        shown = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :] != 0
        targets = jnp.where(shown, targets, IGNORED_LABEL)
    if position_ids is None or (shown is None and attention_mask is not None):
        return targets
    documents = packed_documents(position_ids, shown)
    if documents is None:
        return targets
    ends = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (0, 1)))
    return jnp.where(ends, IGNORED_LABEL, targets)


def sequence_loss(logits: jax.Array, labels: jax.Array, problem: str | None) -> jax.Array:
    """Mean squared error, cross entropy or binary cross entropy by `problem`, in float32. logits: (B, C)."""
    if problem == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    logits = logits.astype(jnp.float32)
    target = labels.astype(jnp.float32).reshape(logits.shape)
    if problem == "regression":
        return jnp.mean((logits - target) ** 2)
    return jnp.mean(jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits))))


def problem_type(config: GemmaConfig, labels: Any) -> str:
    """What the configuration says, or what the labels look like; the guess is not written down in the config."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    dtype = labels.dtype if hasattr(labels, "dtype") else np.asarray(labels).dtype
    return "single_label_classification" if jnp.issubdtype(dtype, jnp.integer) else "multi_label_classification"


def check_token_labels(labels: Any, input_ids: Any, classes: int) -> None:
    """labels: (B, S) whole numbers below `classes`, or -100. Raises InputError."""
    shape = tuple(np.shape(input_ids))
    if tuple(np.shape(labels)) != shape:
        raise InputError(f"labels has shape {tuple(np.shape(labels))}; the inputs are {shape}.")
    _check_classes(labels, classes)


def check_sequence_labels(labels: Any, problem: str, batch: int, classes: int) -> None:
    """labels: as the heads take them. Raises InputError."""
    flat_shapes = [(batch,), (batch, 1)]
    allowed = flat_shapes if problem == "single_label_classification" or classes == 1 else [(batch, classes)]
    if tuple(np.shape(labels)) not in allowed:
        raise InputError(f"labels has shape {tuple(np.shape(labels))}; it must be {' or '.join(map(str, allowed))}.")
    if problem == "single_label_classification":
        _check_classes(labels, classes)
        return
    if not known(labels):
        return
    values = np.asarray(labels, np.float32)
    low, high = (-np.inf, np.inf) if problem == "regression" else (0.0, 1.0)
    bad = values[~(np.isfinite(values) & (values >= low) & (values <= high))]
    if bad.size:
        limit = "a finite number" if problem == "regression" else "from 0 to 1"
        raise InputError(f"label {bad[0]} is out of range; for {problem} each must be {limit}.")


def _check_classes(labels: Any, classes: int) -> None:
    if not known(labels):
        return
    values = np.asarray(labels)
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"labels are {values.dtype}; class numbers must be whole numbers.")
    bad = values[((values < 0) & (values != IGNORED_LABEL)) | (values >= classes)]
    if bad.size:
        raise InputError(
            f"label {int(bad[0])} is not one of {classes} (0 to {classes - 1}; {IGNORED_LABEL} marks what to ignore)."
        )
