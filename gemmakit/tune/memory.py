"""What a run takes of memory at least, known before its first step, and refused where it is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gemmakit.checkpoint.memory import require_memory
from gemmakit.tune.batches import Order
from gemmakit.tune.objectives import Objective
from gemmakit.tune.optimizer import STATE_BYTES
from gemmakit.tune.settings import TuneSettings

LESS_TRAINED = "Train an adapter instead of --full, a smaller --rank, or beside --qlora int4; or --freeze parameters."
LESS_AT_ONCE = "Pass --checkpointing, a smaller --batch-size (with --accumulate), --max-length or --loss-chunk."


@dataclass(frozen=True)
class Need:
    """Bytes beside the weights. state: gradients and moments; tokens: of the largest pass, with padding; activations:
    what all its layers keep for the way back, at least; logits: of the positions that have them at a time.
    """

    state: int
    tokens: int
    activations: int
    logits: int


def state_bytes(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad) * STATE_BYTES


def need(model: Any, objective: Objective, settings: TuneSettings) -> Need:
    order = Order(len(objective), settings.batch_size, settings.accumulate, settings.seed)
    steps = min(settings.max_steps or order.steps_per_epoch, order.steps_per_epoch)
    passes = (units[:: settings.devices] for number in range(steps) for units in order.step(number))
    tokens = max(map(objective.tokens, passes))
    logits = min(settings.loss_chunk, tokens) * model.config.vocab_size * model.dtype.itemsize
    return Need(state_bytes(model), tokens, tokens * _kept_per_token(model, settings.checkpointing), logits)


def _kept_per_token(model: Any, checkpointing: bool) -> int:
    """Bytes of a token's activations: of the MLP gate, activation and up; of attention queries and what comes of them;
    what enters each half of a layer. With checkpointing what enters a layer, and of one layer all.
    """
    config, D = model.config, model.config.hidden_size
    specs = [config.layer(i) for i in range(_first_trained(model), config.num_hidden_layers)]
    whole = [3 * s.intermediate_size + 2 * s.num_attention_heads * s.head_dim + 2 * D for s in specs]
    if not whole:
        return 0
    return (D * len(whole) + max(whole) if checkpointing else sum(whole)) * model.dtype.itemsize


def _first_trained(model: Any) -> int:
    """The layer from which on gradients are needed: none before it holds, or stands behind, what is trained."""
    names = [name.split(".") for name, p in model.named_parameters() if p.requires_grad]
    layers = [int(name[name.index("layers") + 1]) for name in names if "layers" in name]
    embeds = any(part.startswith("embed_tokens") for name in names for part in name)
    return 0 if embeds else min(layers, default=model.config.num_hidden_layers)


def require_state(model: Any, more: int = 0) -> None:
    """NotEnoughMemory where gradients and moments, and `more` bytes, are over what is free."""
    trained = state_bytes(model) // STATE_BYTES
    _require(model, more + state_bytes(model), f"training {trained:,} parameters", LESS_TRAINED)


def require_pass(model: Any, objective: Objective, settings: TuneSettings) -> None:
    """NotEnoughMemory where that and the largest pass are."""
    wanted = need(model, objective, settings)
    total = wanted.state + wanted.activations + wanted.logits
    _require(model, total, f"a step with a pass of {wanted.tokens:,} tokens", LESS_AT_ONCE)


def _require(model: Any, total: int, what: str, remedy: str) -> None:
    if model.device.type in ("cpu", "cuda"):
        require_memory(total, what, remedy=remedy, free=free_bytes(model.device))


def free_bytes(device: torch.device) -> int | None:
    """What can still be taken of a GPU's memory; None for the host, of which `require_memory` knows, and for others."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return None
