"""GGUF, the format of llama.cpp: a file as named arrays under the released checkpoint's names.

Matrices of F32, F16 and BF16 are views of the mapped file. Blocks become numbers when they are asked for, a few rows at
a time (gguf_blocks.py); or they stay codes and scales in gemmakit's own layout of int4, int5 and int8
(`gemmakit.pytorch.kernels.packed`), which is theirs exactly. Source of the names and keys: llama.cpp's gguf-py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gemmakit.checkpoint.arrays import BITS, TensorInfo, numpy_dtype, to_jax
from gemmakit.errors import CheckpointError
from gemmakit.family import KINDS
from gemmakit.gguf import MAGIC, PLAIN, GgufHeader, GgufTensor, read_gguf_header
from gemmakit.gguf_settings import EMBEDDING, HEAD, TABLE, is_setting, matrices_dtype
from gemmakit.quantization import stored_parts

# The blocks that are read as numbers.
DECODED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
BLOCK = 32
# The blocks that gemmakit's own layout holds, and their bits.
_BITS = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}


# -- names -------------------------------------------------------------------------------------------------------------

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Where layers have embeddings of their own.
_WHOLE_PER_LAYER = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PER_LAYER = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
# A layer's norms in the order of `family.Norms`.
_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_THEIR_SCALAR, _OUR_SCALAR = "layer_output_scale.weight", "layer_scalar"
_THEIR_LAYER = re.compile(r"blk\.(\d+)\.([\w.]+)")
_OUR_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+)")


@cache
def _names(model_type: str) -> tuple[dict[str, str], dict[str, str]]:
    """Of the whole model, and within a layer: their name -> that of the released checkpoint."""
    kind = KINDS[model_type]
    has_own = "hidden_size_per_layer_input" in kind.defaults
    norms = {theirs: ours for theirs, ours in zip(_NORMS, kind.norms, strict=True) if ours}
    heads = {f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk" if getattr(kind, f"{part}_norm")}
    whole = {**_WHOLE, **(_WHOLE_PER_LAYER if has_own else {})}
    layer = {**_LAYER, **norms, **heads, **(_LAYER_PER_LAYER if has_own else {})}
    parts = {f"{theirs}.{end}": f"{ours}.{end}" for theirs, ours in layer.items() for end in ("weight", "bias")}
    parts |= {_THEIR_SCALAR: _OUR_SCALAR} if kind.layer_scalar else {}
    return {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in whole.items()}, parts


@cache
def _their_names(model_type: str) -> tuple[dict[str, str], dict[str, str]]:
    """The inverse of `_names`."""
    whole, layer = ({ours: theirs for theirs, ours in names.items()} for names in _names(model_type))
    return whole, layer


def released_name(name: str, model_type: str = "gemma") -> str | None:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; None for what this Gemma does not have."""
    whole, layer = _names(model_type)
    match = _THEIR_LAYER.fullmatch(name)
    part = layer.get(match[2]) if match else None
    return f"model.layers.{match[1]}.{part}" if match and part else whole.get(name)


def gguf_name(name: str, model_type: str = "gemma") -> str | None:
    """The inverse; a model without a head writes the same names without "model."."""
    name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
    whole, layer = _their_names(model_type)
    match = _OUR_LAYER.fullmatch(name)
    part = layer.get(match[2]) if match else None
    return f"blk.{match[1]}.{part}" if match and part else whole.get(name)


def is_norm(name: str) -> bool:
    """Whether this is a norm's weight w, which GGUF stores as 1 + w where the model multiplies by that."""
    return name.endswith("norm.weight")


def is_vector(name: str) -> bool:
    """Whether this, by either name, is never rounded: a norm's weight, or what a layer's result is multiplied by."""
    return is_norm(name) or name.endswith((_OUR_SCALAR, _THEIR_SCALAR))


# -- a file as named arrays --------------------------------------------------------------------------------------------


def sniff(path: Path) -> bool:
    """Whether the file is called so, or begins as every GGUF does."""
    try:
        if path.suffix == ".gguf":
            return True
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def open(path: Path) -> GgufFile:
    """The file, its blocks as float32."""
    return GgufFile(path)


class GgufFile:
    """One GGUF file. Opening checks its header, its architecture, and every tensor's name and type.

    dtype: what blocks are dequantized to; None for the dtype that a model of these matrices computes in.
    keep_quantized: give Q8_0, Q5_0 or Q4_0 as codes under the weight's name, "..._scale", of Q4_0 "..._zero", where
    gemmakit has a place for them; `quantization` then is the quantization_config that says so, or None.
    """

    kind = "gguf"

    def __init__(self, path: Path, dtype: str | None = "float32", *, keep_quantized: bool = False):
        self.path = path
        header = read_gguf_header(path)
        model_type = header.require_gemma()
        self.dtype = dtype or matrices_dtype(header)
        self.quantization, kept = stored_quantization(header) if keep_quantized else (None, frozenset[str]())
        self._makers: dict[str, Callable[[str], Any]] = {}  # framework "pt" or "np" -> an array on the CPU
        self._norm_offset = header.kind.norm_offset
        tensors: dict[str, TensorInfo] = {}
        for name, held in header.tensors.items():
            if is_setting(header, name):
                continue
            for part, info, make in self._parts(_named(header, model_type, name, held), held, name in kept):
                tensors[part], self._makers[part] = info, make
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.metadata: Mapping[str, str] = MappingProxyType({"format": "gguf"})

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        if framework == "pt":
            return self._makers[name]("pt").to(device)
        array = self._makers[name]("np")
        return array if framework == "np" else to_jax(array)

    def close(self) -> None:
        """Nothing is held open: every array has a mapping of its own."""

    def _parts(self, name: str, held: GgufTensor, keep: bool) -> Iterator[tuple[str, TensorInfo, Callable[[str], Any]]]:
        """What a tensor of the file is given out as: names, and for each what it is and how it is made."""
        if is_norm(name) and self._norm_offset:
            yield name, _made("float32", held.shape), partial(self._norm, name, held)
        elif held.kind.name in PLAIN:
            info = TensorInfo(PLAIN[held.kind.name], held.shape, held.begin, held.end)
            yield name, info, partial(self._view, name, held)
        elif keep:
            yield from self._packed(name, held)
        else:
            yield name, _made(self.dtype, held.shape), partial(self._dequantized, name, held)

    def _view(self, name: str, held: GgufTensor, framework: str) -> Any:
        return _as(name, self._blocks(held).reshape(-1), PLAIN[held.kind.name], held.shape, framework)

    def _norm(self, name: str, held: GgufTensor, framework: str) -> Any:
        """The file's 1 + w, less 1."""
        stored = self._view(name, held, framework)
        return (stored.float() if framework == "pt" else stored.astype("float32")) - self._norm_offset

    def _dequantized(self, name: str, held: GgufTensor, framework: str) -> Any:
        """Every block as numbers, rounded once to the dtype; beside the result it takes a few MB."""
        import numpy as np

        from gemmakit.checkpoint.formats import gguf_blocks

        out: Any
        as_array: Any
        if framework == "pt":
            import torch

            out, as_array = torch.empty(prod(held.shape), dtype=getattr(torch, self.dtype)), torch.from_numpy
        else:
            out, as_array = np.empty(prod(held.shape), numpy_dtype(name, self.dtype)), np.asarray
        kind, blocks = held.kind, self._blocks(held)
        step = gguf_blocks.CHUNK_ELEMENTS // kind.block
        for begin in range(0, len(blocks), step):
            numbers = gguf_blocks.dequantize(blocks[begin : begin + step], kind.name)
            at = begin * kind.block
            out[at : at + numbers.size] = as_array(numbers)
        return out.reshape(held.shape)

    def _packed(self, name: str, held: GgufTensor) -> Iterator[tuple[str, TensorInfo, Callable[[str], Any]]]:
        """Codes and scales of a matrix, and for 4 bits zeros: every one is 8."""
        rows, width = held.shape
        parts = stored_parts(rows, width, _BITS[held.kind.name], BLOCK)
        codes, scale = parts[""], parts["_scale"]
        make = self._fives if held.kind.name == "Q5_0" else partial(self._field, slice(2, None))
        yield name, _made(*codes), partial(make, held, *codes)
        if "_zero" in parts:
            yield f"{name}_zero", _made(*parts["_zero"]), partial(_eights, parts["_zero"][1])
        yield f"{name}_scale", _made(*scale), partial(self._field, slice(2), held, *scale)

    def _fives(self, held: GgufTensor, dtype: str, shape: tuple[int, ...], framework: str) -> Any:
        """Codes of 5 bits, a few rows at a time."""
        import numpy as np

        from gemmakit.checkpoint.formats import gguf_blocks

        out, blocks = np.empty(shape, np.uint8), self._blocks(held).reshape(shape[0], -1, held.kind.nbytes)
        step = max(1, gguf_blocks.CHUNK_ELEMENTS // held.shape[1])
        for begin in range(0, len(out), step):
            out[begin : begin + step] = gguf_blocks.five_bit_codes(blocks[begin : begin + step])
        return _as("", out.reshape(-1), dtype, shape, framework)

    def _field(self, part: slice, held: GgufTensor, dtype: str, shape: tuple[int, ...], framework: str) -> Any:
        """One field of every block, copied out of them."""
        import numpy as np

        return _as("", np.ascontiguousarray(self._blocks(held)[:, part]).reshape(-1), dtype, shape, framework)

    def _blocks(self, held: GgufTensor) -> Any:
        """The tensor's bytes (blocks, bytes of one), mapped; private, so that writing never changes the file."""
        import numpy as np

        raw = np.memmap(self.path, np.uint8, mode="c", offset=held.begin, shape=(held.end - held.begin,))
        return np.asarray(raw).reshape(-1, held.kind.nbytes)


def _named(header: GgufHeader, model_type: str, name: str, held: GgufTensor) -> str:
    """The released name. Raises CheckpointError for a tensor that Gemma does not have, or that cannot be read."""
    ours, kind = released_name(name, model_type), held.kind.name
    if ours is None:
        raise CheckpointError(f"{header.path} holds {name!r:.120}, for which Gemma has no place. It is another model.")
    readable = tuple(PLAIN) if is_vector(ours) else (*PLAIN, *DECODED)
    if kind not in readable:
        raise CheckpointError(
            f"{header.path}: {name} is of type {kind}; gemmakit reads {', '.join(readable)}. Take a file of one of "
            "these types."
        )
    return ours


def _made(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """An array that is made when asked for, and has no place in the file in this form."""
    return TensorInfo(dtype, shape, 0, prod(shape) * BITS[dtype] // 8, mapped=False)


def _eights(shape: tuple[int, ...], framework: str) -> Any:
    import numpy as np

    return _as("", np.full(prod(shape), 8, np.uint8), "uint8", shape, framework)


def _as(name: str, raw: Any, dtype: str, shape: tuple[int, ...], framework: str) -> Any:
    """Bytes (n,) as an array, without a copy."""
    if framework != "pt":
        return raw.view(numpy_dtype(name, dtype)).reshape(shape)
    import torch

    return torch.from_numpy(raw).view(getattr(torch, dtype)).view(shape)


def stored_quantization(header: GgufHeader) -> tuple[dict[str, Any] | None, frozenset[str]]:
    """What of a file stays in its own blocks, as gemmakit's `quantization_config`, and the file's names of those.

    All projections of the one of Q4_0, Q5_0 and Q8_0 that most have, if these are a quarter of all; and the embedding,
    which is the head, if its type fits beside them; and where layers have embeddings of their own those, if they have
    the type of the embedding. Everything else becomes plain numbers. (None, nothing) if there is nothing to keep.
    """
    model_type = header.require_gemma()
    held = {name: tensor.kind.name for name, tensor in header.tensors.items() if len(tensor.shape) == 2}
    heads = [name for name in (EMBEDDING, HEAD) if name in held]
    projections = {name: kind for name, kind in held.items() if name not in (*heads, TABLE)}
    counts = Counter(projections.values())
    most = max(_BITS, key=lambda kind: counts[kind])
    kept = [name for name, kind in projections.items() if kind == most and 4 * counts[most] >= len(projections)]
    head_kinds = {held[name] for name in heads}
    kind = most if kept or len(head_kinds) != 1 else next(iter(head_kinds))
    fits = head_kinds in ({"Q8_0"}, {kind}) and kind in _BITS
    if not kept and not fits:
        return None, frozenset()
    plain = {*projections} - {*kept}
    if TABLE in held and fits and held[TABLE] in head_kinds:
        heads.append(TABLE)
    elif TABLE in held:
        plain.add(TABLE)
    bits, head = _BITS[kind], _BITS[head_kinds.pop()] if fits else None
    others = sorted(str(released_name(name, model_type)).removesuffix(".weight") for name in plain)
    config = {
        "quant_method": "gemmakit",
        "bits": bits,
        "group_size": BLOCK,
        "head_bits": head,
        "head_group_size": BLOCK if head == 8 and bits < 8 else None,
        "modules_to_not_convert": (others if kept else ["model.layers", *(n for n in others if "layers." not in n)])
        or None,
    }
    return config, frozenset([*kept, *(heads if fits else ())])
