"""What training needs besides jax.grad: losses, label checks, adapters.

Axis letters: B batch, S positions, V vocabulary, C labels, r the rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gemmakit.errors import InputError
from gemmakit.flax.names import flat, nested

IGNORED_LABEL = -100
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over targets that are not -100, in float32. logits: (..., V); targets: (...)."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    counted = targets != IGNORED_LABEL
    chosen = jnp.take_along_axis(logprobs, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counted, chosen, 0.0)) / counted.sum()


def causal_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy in float32. logits: (B, S, V); targets: (B, S), the id that follows each position, or -100."""
    return cross_entropy(logits, targets)


def next_tokens(labels: jax.Array) -> jax.Array:
    """What each position is to predict: the label after it; the last has none. labels: (B, S)."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)


def known(*arrays: Any) -> bool:
    """Whether the numbers can be looked at: inside jit, grad and vmap they cannot."""
    return not any(isinstance(a, Tracer) for a in arrays)


def check_token_labels(labels: Any, input_ids: Any, classes: int) -> Any:
    """labels: (B, S) whole numbers below `classes`, or -100. Raises InputError."""
    shape = tuple(np.shape(input_ids))
    if tuple(np.shape(labels)) != shape:
        raise InputError(f"labels has shape {tuple(np.shape(labels))}; the inputs are {shape}.")
    return check_classes(labels, classes)


def check_classes(labels: Any, classes: int) -> Any:
    if not known(labels):
        return labels
    values = np.asarray(labels)
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"labels are {values.dtype}; class numbers must be whole numbers.")
    bad = values[((values < 0) & (values != IGNORED_LABEL)) | (values >= classes)]
    if bad.size:
        raise InputError(
            f"label {int(bad[0])} is not one of {classes} (0 to {classes - 1}; {IGNORED_LABEL} marks what to ignore)."
        )
    return labels


def init_lora(
    params: Any, rank: int, rng: jax.Array, *, targets: Iterable[str] = ("q_proj", "v_proj")
) -> dict[str, Any]:
    """Adapters for the projections of every layer that `targets` names; pass them as `lora=` and train them alone.

    Each is a (in, r), drawn, and b (r, out), zero, so that a fresh adapter changes nothing. Source: arXiv:2106.09685,
    with alpha = rank.

    Raises InputError for a rank below 1 or a name that is no projection.
    """
    targets = tuple(targets)
    unknown = [name for name in targets if name not in LORA_TARGETS]
    if rank < 1 or unknown or not targets:
        raise InputError(
            f"LoRA of rank {rank} on {', '.join(targets) or 'nothing'}: the rank must be at least 1 and the targets "
            f"among {', '.join(LORA_TARGETS)}."
        )
    out: dict[str, jax.Array] = {}
    for path, kernel in flat(params).items():
        above, _, last = path.rpartition("/")
        if last == "kernel" and above.rpartition("/")[2] in targets:
            *stack, wide, narrow = kernel.shape
            rng, key = jax.random.split(rng)
            out[f"{above}/a"] = jax.random.normal(key, (*stack, wide, rank), jnp.float32) * wide**-0.5
            out[f"{above}/b"] = jnp.zeros((*stack, rank, narrow), jnp.float32)
    return nested(out)


def merge_lora(params: Any, lora: Any) -> dict[str, Any]:
    """The parameters with every adapter's product added to its kernel, in the kernel's dtype."""
    out, adapters = flat(params), flat(lora)
    for path, a in adapters.items():
        above, _, last = path.rpartition("/")
        if last == "a":
            kernel = out[f"{above}/kernel"]
            update = a.astype(jnp.float32) @ adapters[f"{above}/b"].astype(jnp.float32)
            out[f"{above}/kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return nested(out)
