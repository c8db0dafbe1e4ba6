"""What the Flax tests share: shapes, weights, batches and how far apart two arrays are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny_shapes
import torch
from tiny_shapes import VOCAB

import gemmakit

COMMON = dict(tiny_shapes.COMMON, num_hidden_layers=2)
PADDING = ("none", "left", "right")

# The other members of the family, with a window that a text of a few words passes.
WINDOW = 5
LAYERS = dict(num_hidden_layers=3, sliding_window=WINDOW, query_pre_attn_scalar=24,
              layer_types=["sliding_attention", "full_attention", "sliding_attention"])  # fmt: skip
CAPS = dict(attn_logit_softcapping=3.0, final_logit_softcapping=4.0)
ROPES = dict(
    rope_parameters={
        "sliding_attention": dict(rope_type="default", rope_theta=50.0),
        "full_attention": dict(rope_type="linear", factor=4.0, rope_theta=900.0),
    }
)
# Gemma 4 with every part at once: embeddings of each layer, keys and values of other layers, values that are keys.
GEMMA4 = dict(
    model_type="gemma4_text", sliding_window=WINDOW, final_logit_softcapping=4.0, hidden_size_per_layer_input=20,
    vocab_size_per_layer_input=VOCAB,
)  # fmt: skip
MEMBERS = {
    "gemma2": dict(model_type="gemma2", **LAYERS, **CAPS),
    "gemma3": dict(model_type="gemma3_text", **LAYERS, **ROPES),
    "vaultgemma": dict(model_type="vaultgemma", **LAYERS, **CAPS),
    "embeddinggemma": dict(model_type="gemma3_text", **LAYERS, **ROPES, use_bidirectional_attention=True),
    "gemma4": dict(
        **GEMMA4, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        use_double_wide_mlp=True, global_head_dim=20, attention_k_eq_v=True, num_global_key_value_heads=1,
    ),
}  # fmt: skip
# The same members with layers of one shape, which can be scanned.
ALIKE = {
    **MEMBERS,
    "gemma4": dict(
        **GEMMA4, num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"],
        global_head_dim=None,
    ),
}  # fmt: skip


@dataclass
class Both:
    """The same weights in both backends."""

    flax: Any
    torch: Any
    folder: Path


def make_torch(cls="CausalLM", seed=0, model_type="gemma", **fields):
    """A PyTorch model with weights at a scale where a wrong sign, shift or scale shows. cls: an Auto class's."""
    torch.manual_seed(seed)
    config = gemmakit.AutoConfig.for_model(model_type, **{**COMMON, **fields})
    model = getattr(gemmakit, f"AutoModelFor{cls}").from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # what a norm multiplies by is around 1.1 in every member
                parameter.normal_(1.1 - config.kind.norm_offset, 0.3)
                if config.kind.scale is not None and name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.mul_(len(parameter) ** -0.25)  # in place of a scale of scores
            elif name.endswith("bias"):
                parameter.normal_(0.1, 0.3)
            else:
                parameter.normal_(0.0, 0.2)
        for buffer in (b for name, b in model.named_buffers() if name.endswith("layer_scalar")):
            buffer.uniform_(0.5, 1.5)
    return model


def batch(padding="none", rows=3, width=11, seed=1):
    """ids (rows, width) that begin with <bos>, and a mask (None, or uneven on the given side)."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, VOCAB, (rows, width))
    if padding == "none":
        ids[:, 0] = 2
        return ids, None
    mask = np.ones_like(ids)
    for row in range(rows):
        missing = (0, 3, 7)[row % 3]
        if padding == "left":
            mask[row, :missing] = 0
            ids[row, missing] = 2
        else:
            ids[row, 0] = 2
            mask[row, width - missing :] = 0
    return np.where(mask, ids, 0), mask


def labels_of(ids, mask):
    """The ids, and -100 where a position or the one before it is padding, and in a hole."""
    seen = np.ones_like(ids) if mask is None else mask
    before = np.pad(seen, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
    labels = np.where(seen & before, ids, -100)
    labels[0, 4:6] = -100
    return labels


def as_torch(array):
    return None if array is None else torch.tensor(np.asarray(array))


def as_numpy(array):
    if isinstance(array, torch.Tensor):
        return array.detach().double().numpy()
    return np.asarray(array).astype(np.float64)


def apart(ours, theirs, mask=None):
    """The largest difference as a share of the largest value, at positions that are not padding."""
    ours, theirs = as_numpy(ours), as_numpy(theirs)
    assert ours.shape == theirs.shape
    if mask is not None:
        ours, theirs = ours[mask.astype(bool)], theirs[mask.astype(bool)]
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def flat(tree):
    """The leaves by path, "a/b/c"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


class CountCompilations:
    """How many programs XLA was asked to compile while this was open."""

    def __enter__(self):
        self.count = 0
        self.open = True
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def _heard(self, event, seconds, **_):
        self.count += self.open and event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *_):
        self.open = False  # jax has no public way to take a listener back
