"""Files of torch.save, read with weights_only: plain ones, and Google's released PyTorch checkpoint.

That one is `{"model_state_dict": {...}}` with q, k and v in one matrix.

Source of the names: google/gemma_pytorch, of Gemma 1, 2 and 3, and the conversion script that the documents of Gemma
name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmakit.checkpoint.arrays import TensorInfo, numpy_dtype, to_jax
from gemmakit.checkpoint.memory import require_memory
from gemmakit.dtypes import dtype_name
from gemmakit.errors import CheckpointError, NotEnoughMemory, UnsafeFile

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
STATE = "model_state_dict"
# Of a model of text, and of one that sees images too.
EMBEDDERS = ("embedder.weight", "text_token_embedder.weight")
QKV = "self_attn.qkv_proj.weight"
# name there -> name here; the embedder is the tied head too, which is stored once
NAMES = {**dict.fromkeys(EMBEDDERS, "model.embed_tokens.weight"), "model.norm.weight": "model.norm.weight"}
# The same within a layer.
IN_LAYER = {
    **{name: name for name in (
        "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
        "input_layernorm.weight", "post_attention_layernorm.weight", "pre_feedforward_layernorm.weight",
        "post_feedforward_layernorm.weight",
    )},
    "self_attn.query_norm.weight": "self_attn.q_norm.weight",
    "self_attn.key_norm.weight": "self_attn.k_norm.weight",
}  # fmt: skip
# The rotary tables, which every model computes.
DROPPED = ("freqs_cis", "local_freqs_cis", "global_freqs_cis")
# What only images need begins so.
IMAGES = ("siglip_vision_model.", "mm_soft_embedding_norm.", "mm_input_projection.")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,4})\.(.+)")


class PickleFile:
    """One file of torch.save, read with weights_only: plain tensors, no code. `held` is name -> torch.Tensor."""

    kind = "pickle"

    def __init__(self, path: Path, content: Any = None):
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self.held = _tensors_only(path, unpickle(path) if content is None else content)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype_name(t.dtype), tuple(t.shape), 0, t.numel() * t.element_size())
            for name, t in self.held.items()
        }

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        held = self.held[name]
        if framework == "pt":
            return held.to(device)
        info = self.tensors[name]
        import torch

        flat = held.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        array = flat.view(numpy_dtype(name, info.dtype)).reshape(info.shape)
        return array if framework == "np" else to_jax(array)

    def close(self) -> None:
        self.held = dict(self.held)


def unpickle(path: Path) -> Any:
    """What torch.save wrote, tensors mapped from the file where they can be. Raises UnsafeFile, CheckpointError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on what it then refuses
        return _unpickle(path)


def _unpickle(path: Path) -> Any:
    import pickle

    import torch

    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch before 1.6 did not write zip archives, which alone can be mapped
            remedy = "Save it again with a newer torch, then it is mapped."
            require_memory(path.stat().st_size, str(path), remedy=remedy)
            return torch.load(path, map_location="cpu", weights_only=True)
    except NotEnoughMemory:
        raise
    except pickle.UnpicklingError as error:
        raise UnsafeFile(f"{path} holds more than tensors and is refused: {_first_line(error)}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}. Download it again.") from error


def _tensors_only(path: Path, content: Any) -> dict[str, Any]:
    import torch

    def plain(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"

    if not isinstance(content, dict) or not all(isinstance(n, str) and plain(value) for n, value in content.items()):
        raise CheckpointError(f"{path} does not hold a plain mapping of names to tensors.")
    return content


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def is_google(names: Mapping[str, Any]) -> bool:
    """Whether these are Google's names for tensors."""
    return any(name in EMBEDDERS or name.endswith(QKV) for name in names)


def sniff(path: Path) -> bool:
    """By its name: a pickle of any layout."""
    return path.name.endswith(SUFFIXES)


class GoogleFile:
    """Google's file as one of the PyTorch layout: the same bytes, q, k and v as views of their rows.

    Rows of the joint matrix: N * H of q, then K * H of k and K * H of v; with one kv head (N + 2) * H, with as many as
    query heads three equal parts. N * H are the columns of o_proj. Raises CheckpointError for an unknown name.
    """

    kind = "google"

    def __init__(self, path: Path, held: Mapping[str, Any]):
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._held = _renamed(path, held)
        self.tensors: Mapping[str, TensorInfo] = PickleFile(path, self._held).tensors

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        return PickleFile(self.path, {name: self._held[name]}).tensor(name, framework, device)

    def close(self) -> None:
        """Nothing to let go of: the tensors hold their own mapping."""


def open(path: Path) -> PickleFile | GoogleFile:
    """A file of torch.save, in Google's names or in those of the PyTorch layout. Raises UnsafeFile, CheckpointError."""
    content = unpickle(path)
    if isinstance(content, dict) and STATE in content:
        content = content[STATE]
    file = PickleFile(path, content)
    return GoogleFile(path, file.held) if is_google(file.tensors) else file


def _renamed(path: Path, held: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, tensor in held.items():
        if name not in DROPPED:
            for new, part in _parts(path, name, tensor, held).items():
                if new in out:
                    raise CheckpointError(f"{path}: two tensors are called {new!r}, the second is {name!r}.")
                out[new] = part
    return out


def _parts(path: Path, name: str, tensor: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    """What one tensor of the file becomes."""
    if name in NAMES:
        return {NAMES[name]: tensor}
    if name.startswith(IMAGES):
        return {name: tensor}
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[2] not in (*IN_LAYER, QKV):
        advice = " It is quantized: convert the checkpoint it was made from." if "scaler" in name else ""
        raise CheckpointError(f"{path} holds {name!r}, which no Gemma of Google's PyTorch releases has.{advice}")
    if layer[2] != QKV:
        return {f"model.layers.{layer[1]}.{IN_LAYER[layer[2]]}": tensor}
    return _split(path, name, tensor, held.get(name.replace("qkv_proj", "o_proj")), f"model.layers.{layer[1]}")


def _split(path: Path, name: str, qkv: Any, o: Any, layer: str) -> dict[str, Any]:
    """(N * H + 2 * K * H, D) -> q (N * H, D), k and v (K * H, D)."""
    rows = qkv.shape[0] if qkv.ndim == 2 else 0
    query = o.shape[1] if o is not None and o.ndim == 2 else 0
    rest = rows - query
    if o is None:
        raise CheckpointError(f"{path} lacks {name.replace('qkv_proj', 'o_proj')!r}, beside {name!r}.")
    if query < 1 or rest < 2 or rest % 2:
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(qkv.shape)}; beside o_proj of shape {tuple(o.shape)} it needs that one's "
            "columns as rows of q, and as many rows of k as of v."
        )
    q, k, v = qkv[:query], qkv[query : query + rest // 2], qkv[query + rest // 2 :]
    return {f"{layer}.self_attn.{p}_proj.weight": part for p, part in (("q", q), ("k", k), ("v", v))}
