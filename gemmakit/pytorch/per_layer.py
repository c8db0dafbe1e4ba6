"""What each layer of Gemma 4's small sizes reads beside the stream: an embedding of the token, made for that layer.

The model holds one table for all layers, whose rows are read by token, and a projection of the ordinary embedding; a
layer lets their sum through a gate that the stream opens. Parameter names are those of the released checkpoints.
Axis letters: B batch, S positions, D hidden, L layers, P width of a layer's own embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, TokenOutOfRange
from gemmakit.pytorch.layers import STREAM_SCALES, GemmaRMSNorm, GemmaScaledEmbedding, LayerParts, Linear, activated
from gemmakit.pytorch.shapes import Float, Int

TABLE = "embed_tokens_per_layer"
LAYER_PARTS = ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")
_IDS_AT_ONCE = 4096


def model_parts(config: GemmaConfig, padding_idx: int | None) -> dict[str, nn.Module]:
    """By name, what the model has for it; nothing where layers have no embedding of their own."""
    P, L = config.hidden_size_per_layer_input, config.num_hidden_layers
    if not P:
        return {}
    rows = config.vocab_size_per_layer_input or config.vocab_size
    return {
        TABLE: GemmaScaledEmbedding(rows, L * P, padding_idx=padding_idx, scaled_by=P),
        "per_layer_model_projection": Linear(config.hidden_size, L * P, bias=False),
        "per_layer_projection_norm": GemmaRMSNorm(P, config.rms_norm_eps, offset=config.kind.norm_offset),
    }


def layer_parts(config: GemmaConfig) -> dict[str, nn.Module]:
    """By name, what a layer has for it."""
    D, P = config.hidden_size, config.hidden_size_per_layer_input
    if not P:
        return {}
    offset = config.kind.norm_offset
    norm = GemmaRMSNorm(D, config.rms_norm_eps, offset=offset, writes_stream=True)
    return dict(zip(LAYER_PARTS, (Linear(D, P, bias=False), Linear(P, D, bias=False), norm), strict=True))


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """By name, what makes layers' inputs of ordinary embeddings; nothing where they have none of their own."""
    return {name: module for name, module in model.named_children() if name.startswith("per_layer_")}


def tables(model: nn.Module) -> list[Any]:
    """The tables of a model: one where layers have embeddings of their own, else none."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == TABLE]


def plan(table: Any) -> str:
    """Where its rows are read, in words."""
    held = sum(t.nbytes for t in (*table.parameters(), *table.buffers()))
    where = "the mapped file, which is not brought into memory" if getattr(table, "stays_in_file", False) else "memory"
    return f"a row a token of {held / 1e9:.2f} GB, from {where}"


def token_inputs(model: Any, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S L P"]:
    """The tokens' part, from the table. Raises TokenOutOfRange."""
    table, L = getattr(model, TABLE), len(model.layers)
    try:
        return table(ids).view(*ids.shape, L, -1)
    except IndexError:
        raise TokenOutOfRange(
            f"token id {int(ids.max())} is outside the {table.num_embeddings} ids that layers have embeddings of their "
            "own for: resize_token_embeddings() changes both tables."
        ) from None


def layer_inputs(
    model: Any, embeds: Float[Tensor, "B S D"], tokens: Float[Tensor, "B S L P"]
) -> Float[Tensor, "B S L P"]:
    """What each layer reads: the tokens' part and what is projected from their ordinary embeddings."""
    projected = model.per_layer_model_projection(embeds) * embeds.shape[-1] ** -0.5
    return (model.per_layer_projection_norm(projected.view(tokens.shape)) + tokens) * 2.0**-0.5


def added(parts: LayerParts, x: Float[Tensor, "B S D"], inputs: Float[Tensor, "B S P"]) -> Float[Tensor, "B S D"]:
    """What a layer adds to its stream."""
    gate = parts.per_layer_input_gate(x)
    scale = STREAM_SCALES.get(x.dtype, 1.0)
    gate = activated(parts.act_fn, gate if scale == 1.0 else gate / scale)
    return parts.post_per_layer_input_norm(parts.per_layer_projection(gate * inputs))


@torch.no_grad()
def ids_of(embedding: Any, embeds: Float[Tensor, "B S D"]) -> Int[Tensor, "B S"]:
    """The tokens that embeddings are those of, looked for in the whole table.

    Raises InputError where one is no token's.
    """
    wanted = embeds.flatten(0, 1)
    found = torch.full((len(wanted),), -1, dtype=torch.long, device=embeds.device)
    for start in range(0, embedding.num_embeddings, _IDS_AT_ONCE):
        ids = torch.arange(start, min(start + _IDS_AT_ONCE, embedding.num_embeddings), device=embeds.device)
        rows = embedding(ids)
        at, which = (wanted[:, :1] == rows[:, 0]).nonzero(as_tuple=True)
        same = (wanted[at] == rows[which]).all(-1)
        found[at[same]] = ids[which[same]]
    if bool((found < 0).any()):
        row, place = divmod(int((found < 0).nonzero()[0]), embeds.shape[1])
        raise InputError(
            f"inputs_embeds[{row}, {place}] is no token's embedding, and each layer of this model reads an embedding "
            f"of the token too: give input_ids, or per_layer_inputs of shape {(*embeds.shape[:2], 'layers', 'width')}."
        )
    return found.view(embeds.shape[:2])
