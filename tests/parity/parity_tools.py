"""What the parity tests share: shapes, weights, batches and how far apart two tensors are."""

from dataclasses import dataclass
from typing import Any

import tiny_shapes
import torch
import transformers
from tiny_shapes import VOCAB

import gemmakit

COMMON = dict(tiny_shapes.COMMON, num_hidden_layers=3)
LIBRARIES = {"transformers": transformers, "gemmakit": gemmakit}


def randomise(model, seed=0):
    """Weights at a scale where a wrong sign, shift or scale shows: norms away from 0, biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.normal_(0.1, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
        for name, stored in model.named_buffers():
            if name.endswith("layer_scalar"):
                stored.uniform_(0.6, 1.1, generator=generator)


@dataclass
class Pair:
    """The same checkpoint in both libraries."""

    ours: Any
    theirs: Any
    folder: Any


def batch(padding, rows=3, width=11, seed=1):
    """ids (rows, width) that begin with <bos>, and a mask (None, or uneven on the given side)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (rows, width), generator=generator)
    if padding == "none":
        ids[:, 0] = 2
        return ids, None
    mask = torch.ones_like(ids)
    for row in range(rows):
        missing = (0, 3, 7)[row % 3]
        if padding == "left":
            mask[row, :missing] = 0
            ids[row, missing] = 2
        else:
            ids[row, 0] = 2
            if missing:
                mask[row, -missing:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def apart(ours, theirs, mask=None):
    """The largest difference as a share of the oracle's largest value, at positions that are not padding."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    assert torch.isfinite(ours).all()
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
