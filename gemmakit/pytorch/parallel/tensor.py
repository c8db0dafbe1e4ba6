"""Tensor parallel: each process has some heads, some of the MLP and some rows of the vocabulary, of every layer.

The plan is data: a style a pattern of names, and from the layers' specs which part of a tensor a process has. A process
builds the model of its part, from a configuration with as many heads as it has, so that caches and kernels need to know
nothing; what differs are three kinds of modules (`parallel.modules`), where the processes meet: twice a layer, at the
embedding and at the head. Source: arXiv:1909.08053.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.checkpoint import Checkpoint
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.layer_spec import LayerSpec
from gemmakit.pytorch.kernels.packed import BLOCK, FOUR
from gemmakit.pytorch.layers import GemmaScaledEmbedding, Linear
from gemmakit.pytorch.parallel import processes
from gemmakit.pytorch.parallel.modules import (
    Gathered,
    GatheredLinear,
    SomeRows,
    SomeRowsEmbedding,
    Summed,
    SummedLinear,
)
from gemmakit.pytorch.quantize.modules import QuantizedEmbedding, QuantizedLinear

COLWISE, ROWWISE, ROWS, GATHERED = "colwise", "rowwise", "embedding_rowwise", "colwise_gather_output"
# A style a pattern of modules' names, the first that fits; what none fits is whole in every process.
PLAN = {
    "layers.*.self_attn.[qkv]_proj": COLWISE,
    "layers.*.self_attn.o_proj": ROWWISE,
    "layers.*.mlp.gate_proj": COLWISE,
    "layers.*.mlp.up_proj": COLWISE,
    "layers.*.mlp.down_proj": ROWWISE,
    "embed_tokens": ROWS,
    "lm_head": GATHERED,
}


class SummedQuantizedLinear(Summed, QuantizedLinear): ...


class GatheredQuantizedLinear(Gathered, QuantizedLinear): ...


class SomeRowsQuantizedEmbedding(SomeRows, QuantizedEmbedding): ...


_MADE: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    ROWWISE: {Linear: SummedLinear, QuantizedLinear: SummedQuantizedLinear},
    GATHERED: {Linear: GatheredLinear, QuantizedLinear: GatheredQuantizedLinear},
    ROWS: {GemmaScaledEmbedding: SomeRowsEmbedding, QuantizedEmbedding: SomeRowsQuantizedEmbedding},
}


@dataclass(frozen=True)
class Part:
    """`size` of the `whole` rows (dim 0) or columns (dim 1) of a tensor, from `start`."""

    dim: int
    start: int
    size: int
    whole: int


class TensorPlan:
    """What the process `rank` of `size` has of a model. read_bytes: what it has read of the file so far.

    Raises InputError where the heads, the MLP or the vocabulary cannot be shared by so many.
    """

    def __init__(self, config: GemmaConfig, rank: int, size: int, group: Any = None):
        self.config, self.rank, self.size, self.group = config, rank, size, group
        self.read_bytes = 0
        if config.pruned_heads:
            raise InputError("pruned_heads leaves layers with different heads, which a tensor plan does not split.")
        if config.enable_moe_block:
            raise InputError(
                f"the model has {config.num_experts} experts in each layer, which a tensor plan does not split: load "
                "it whole, or spread its layers by device_map."
            )
        if wrong := _obstacle(config, size):
            able = [n for n in range(1, config.num_attention_heads + 1) if not _obstacle(config, n)]
            raise InputError(f"{wrong}, which {size} processes cannot share: take {', '.join(map(str, able))} of them.")

    def local_config(self) -> GemmaConfig:
        """Of the model of this process's part."""
        local = copy.deepcopy(self.config)
        local.num_attention_heads //= self.size
        local.num_key_value_heads = max(1, local.num_key_value_heads // self.size)
        if local.num_global_key_value_heads is not None:
            local.num_global_key_value_heads = max(1, local.num_global_key_value_heads // self.size)
        local.intermediate_size //= self.size
        return local

    def part(self, name: str) -> Part | None:
        """Of the parameter of this name in the whole model; None for all of it."""
        owner, _, attribute = name.rpartition(".")
        style = style_of(owner)
        if style is None or (style == ROWWISE and attribute == "bias"):
            return None
        if style in (ROWS, GATHERED):
            rows = self.config.vocab_size
            each = -(-rows // self.size)
            start = min(rows, self.rank * each)
            return Part(0, start, min(each, rows - start), rows)
        spec, kind = self.config.layer(_layer_of(name)), owner.rpartition(".")[2]
        if kind in ("k_proj", "v_proj"):
            heads, unit = spec.num_key_value_heads, spec.head_dim
        elif kind in ("q_proj", "o_proj"):
            heads, unit = spec.num_attention_heads, spec.head_dim
        else:
            heads, unit = spec.intermediate_size, 1
        # Fewer than processes: neighbours have the same one, as do the query heads that read it.
        start, count = self.rank * heads // self.size, max(1, heads // self.size)
        return Part(1 if style == ROWWISE else 0, start * unit, count * unit, heads * unit)

    def read(self, checkpoint: Checkpoint, key: str, name: str) -> Tensor:
        """This process's part of a stored tensor, on the CPU; of the mapped file no other bytes are touched.

        key: in the checkpoint. name: of the parameter that it is, or that it is the codes or the scales of.
        """
        stored, part = tuple(checkpoint.info(key).shape), self.part(name)
        if part is None or (part.dim == 1 and stored[1] == 1):  # a scale a row is every column's
            tensor = checkpoint.tensor(key)
        elif part.dim == 0:
            tensor = checkpoint.tensor(key).narrow(0, part.start, part.size)
        else:
            start, size = self._columns(checkpoint, key, part, stored[1])
            tensor = checkpoint.columns(key, start, start + size)
        self.read_bytes += tensor.nbytes
        return tensor

    def _columns(self, checkpoint: Checkpoint, key: str, part: Part, columns: int) -> tuple[int, int]:
        """First and number of the stored columns, of which each stands for one or more inputs."""
        # Codes lie in blocks of so many bytes; of scales and zeros a column is a group.
        coded = checkpoint.info(key).dtype == "uint8"
        blocks = [(16, BLOCK), (FOUR * 5 // 8, FOUR), (FOUR * 6 // 8, FOUR)] if coded else []
        each, together = next(
            (block for block in blocks if part.whole * block[0] == columns * block[1]), (1, -(-part.whole // columns))
        )
        if part.whole * each != columns * together or part.start % together or part.size % together:
            raise InputError(
                f"{key} stores {part.whole} inputs in groups of {together}, which {self.size} processes cannot share: "
                "quantize the plain model while it is loaded, or take fewer."
            )
        return part.start // together * each, part.size // together * each

    def enter(self, model: nn.Module) -> None:
        """Make the loaded model of this process's part one of several: its modules meet the others'.

        Raises InputError for a module of a kind that cannot: one of bitsandbytes.
        """
        for name, module in list(model.named_modules()):
            style = style_of(name)
            if style is None or (style == COLWISE and isinstance(module, Linear | QuantizedLinear)):
                continue
            made = _MADE.get(style, {}).get(type(module))
            if made is None:
                raise InputError(
                    f"{name} is a {type(module).__module__}.{type(module).__qualname__}, which a tensor plan does not "
                    "split: load plain weights, or quantize them to int8 or int4."
                )
            module.__class__ = made
            part, own = self.part(f"{name}.weight"), module.__dict__
            assert part is not None
            own["group"] = self.group
            if style == ROWS:
                own["first"], own["num_embeddings"] = part.start, part.whole
                own["padding_idx"] = None  # it says where no gradient goes
            elif style == GATHERED:
                own["outputs"], own["widest"] = part.whole, -(-part.whole // self.size)
            elif self.rank:
                module.register_parameter("bias", None)  # added once
        model.requires_grad_(False)  # the sums have no backward pass
        for module in model.modules():
            if hasattr(module, "tensor_parallel"):
                module.__dict__["tensor_parallel"] = self

    def __str__(self) -> str:
        spec, vocabulary = self.config.layer(0), self.part("embed_tokens.weight")
        assert vocabulary is not None
        shares = {
            "query heads": (spec.num_attention_heads // self.size, spec.num_attention_heads),
            "kv heads": (max(1, spec.num_key_value_heads // self.size), spec.num_key_value_heads),
            "of the MLP": (spec.intermediate_size // self.size, spec.intermediate_size),
            "ids": (vocabulary.size, vocabulary.whole),
        }
        said = ", ".join(f"{mine} of {all_} {what}" for what, (mine, all_) in shares.items())
        return f"process {self.rank} of {self.size}: {said}"

    def __deepcopy__(self, memo: Any) -> TensorPlan:
        return self  # what the processes agreed on


def tensor_plan(asked: str | None, config: GemmaConfig, device: torch.device, mesh: Any = None) -> TensorPlan | None:
    """The plan of this process, which meets the others for it; None where nothing is to be split.

    asked: "auto" or None. mesh: a DeviceMesh of one dimension; by default all processes. From here on they all draw the
    same random numbers, without which they would choose different tokens.
    """
    if asked is None:
        return None
    if asked != "auto":
        raise InputError(f"tp_plan is {asked!r}; it must be 'auto' (gemmakit.pytorch.parallel.tensor.PLAN) or None.")
    processes.join(device)
    group = None if mesh is None else mesh.get_group()
    plan = TensorPlan(config, processes.rank(group), processes.size(group), group)
    if plan.size == 1:
        return None
    torch.manual_seed(processes.shared(torch.initial_seed(), group))
    return plan


def style_of(module: str) -> str | None:
    """How the module of this name is split; None for not at all."""
    found = (style for pattern, style in PLAN.items() if fnmatchcase(f".{module}", f"*.{pattern}"))
    return next(found, None)


def _layer_of(name: str) -> int:
    return int(name.partition("layers.")[2].partition(".")[0])


def _obstacle(config: GemmaConfig, size: int) -> str:
    """Which setting so many processes cannot share; empty where they can."""
    specs = dict.fromkeys(config.layer(i) for i in range(config.num_hidden_layers))
    found = (f"{name} is {value}" for spec in specs for name, value in _uneven(spec, size))
    rows = config.vocab_size
    shared = (size - 1) * -(-rows // size) < rows  # each has as many rows but for the last, which needs one at least
    return next(found, "" if shared else f"vocab_size is {rows}")


def _uneven(spec: LayerSpec, size: int) -> Iterator[tuple[str, int]]:
    heads, kv, wide = spec.num_attention_heads, spec.num_key_value_heads, spec.intermediate_size
    if heads % size:
        yield "num_attention_heads", heads
    if kv % size and size % kv:
        yield "num_key_value_heads", kv
    if wide % size:
        yield "intermediate_size", wide
