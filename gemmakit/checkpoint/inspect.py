"""What a checkpoint is, what it holds and needs, and whether it is whole: the facts behind `gemmakit doctor FILE`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gemmakit.checkpoint.arrays import TensorInfo
from gemmakit.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_index
from gemmakit.checkpoint.formats import GGUF, SAFETENSORS, TITLES
from gemmakit.checkpoint.formats.gguf import released_name
from gemmakit.checkpoint.formats.orbax import OrbaxFile
from gemmakit.checkpoint.formats.safetensors import SafetensorsFile
from gemmakit.checkpoint.layout import (
    EXPERT_MATRICES,
    architecture_of,
    as_matrix,
    differences,
    released_size,
    tensor_shapes,
    tied_names,
)
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, GemmakitError
from gemmakit.generation import GenerationConfig
from gemmakit.gguf import read_gguf_header
from gemmakit.gguf_settings import config_values, is_setting
from gemmakit.quantization import ROUTER, WeightOnlyConfig, stored_parts

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SCAN_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in one line: where, and what was expected and found, or a whole sentence."""

    file: str
    tensor: str | None
    expected: str | None
    found: str | None
    message: str | None = None

    def line(self) -> str:
        if self.message is not None:
            return " ".join(self.message.split())
        where = f"{self.file}: {self.tensor}" if self.tensor else self.file
        return f"{where}: expected {self.expected}, found {self.found}"


@dataclass
class Findings:
    """Everything a report says. `files` are (name, bytes, tensors); `dtypes` numbers a dtype.

    beside: the folder or GGUF file whose tokenizer goes with the weights, which whoever knows tokenizers may look at.
    """

    path: str
    kind: str = ""
    title: str = ""
    architecture: str | None = None
    config: GemmaConfig | None = None
    parameters: int = 0
    tensor_bytes: int = 0
    quantization: str | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    files: list[tuple[str, int, int]] = field(default_factory=list)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scanned: bool = False
    beside: Path | None = None

    def to_dict(self, tensors: bool) -> dict[str, Any]:
        """As JSON has it; the table of tensors if it is asked for."""
        config = self.config
        out = {name: getattr(self, name) for name in ("path", "kind", "title", "architecture", "parameters",
               "tensor_bytes", "quantization", "dtypes", "tokenizer", "notes", "scanned")}  # fmt: skip
        out["files"] = [dict(zip(("name", "bytes", "tensors"), file, strict=True)) for file in self.files]
        out["layers"] = config and config.num_hidden_layers
        out["context"] = config and config.max_position_embeddings
        out["memory"] = memory(config, self.architecture) if config else None
        out["whole"] = not self.problems
        out["problems"] = [{**asdict(problem), "line": problem.line()} for problem in self.problems]
        if tensors:
            out["tensors"] = {
                name: {"dtype": i.dtype, "shape": i.shape, "bytes": i.nbytes} for name, i in self.tensors.items()
            }
        return out


def inspect(
    path: Path, *, deep: bool = False, allow_pickle: bool = False, progress: Callable[[int, int], None] | None = None
) -> Findings:
    """Look at a file or folder without trusting it: headers and sizes, with `deep` every number too.

    A pickle is opened only where `path` is that file, or with `allow_pickle`, and never run.
    progress: told the bytes scanned and those to scan.
    """
    found = Findings(str(path))
    folder = path.parent if path.is_file() else path
    found.config = _config(found, path)
    checkpoint = _weights(found, path, allow_pickle or path.is_file())
    if checkpoint is not None:
        _describe(found, checkpoint)
        _compare(found)
        if deep:
            _scan(found, checkpoint, progress)
    if found.kind == GGUF or (folder / "config.json").is_file() or path.is_dir():
        found.beside = checkpoint.files[0] if found.kind == GGUF and checkpoint else folder
        _check_generation(found, found.beside / "generation_config.json")
    return found


def _check_generation(found: Findings, path: Path) -> None:
    if path.is_file():
        try:
            GenerationConfig.from_pretrained(path.parent)
        except GemmakitError as error:
            found.problems.append(Problem(path.name, None, None, None, f"{path.name}: {error}"))


# -- what it takes in memory -------------------------------------------------------------------------------------------


def memory(config: GemmaConfig, architecture: str | None = None) -> dict[str, dict[str, int]]:
    """dtype or scheme -> bytes of the weights, and of keys and values for 1,000 tokens.

    int8: a byte a weight and a float32 a row; int4: half a byte, and 3 bytes a group of 32 or 128, embedding and head
    in int8. Norms, and keys and values, are then in bfloat16.
    """
    shapes = tensor_shapes(config, architecture or "GemmaForCausalLM")
    kv = config.cache_size(1000)
    out: dict[str, dict[str, int]] = {}
    for name, wide in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        weights = wide * sum(map(prod, shapes.values()))
        out[name] = {"weights": weights, "kv_per_1000_tokens": kv * wide}
    for name, group in (("int8", None), ("int4 g32", 32), ("int4 g128", 128)):
        weights = sum(_quantized_bytes(tensor, shape, group) for tensor, shape in shapes.items())
        out[name] = {"weights": weights, "kv_per_1000_tokens": kv * 2}
    return out


def _quantized_bytes(name: str, shape: tuple[int, ...], group: int | None) -> int:
    module = name.rpartition(".")[0]
    if name.endswith(".weight") and module.endswith(("embed_tokens", "embed_tokens_per_layer", "lm_head")):
        group = None
    elif not name.endswith(EXPERT_MATRICES) and (not name.endswith(".weight") or len(shape) != 2):
        return 2 * prod(shape)
    if module.endswith(ROUTER):
        return 2 * prod(shape)
    rows, columns = as_matrix(shape)
    if group is None:
        return rows * columns + 4 * rows
    return rows * (16 * -(-columns // 32) + 3 * -(-columns // group))


# -- opening -----------------------------------------------------------------------------------------------------------


def _config(found: Findings, path: Path) -> GemmaConfig | None:
    beside = (path.parent if path.is_file() else path) / "config.json"
    if path.suffix == ".gguf" or not beside.is_file():
        return None
    try:
        return GemmaConfig.from_pretrained(beside)
    except GemmakitError as error:
        found.problems.append(Problem("config.json", None, None, None, f"config.json: {error}"))
        return None


def _weights(found: Findings, path: Path, allow_pickle: bool) -> Checkpoint | None:
    """The checkpoint as far as it can be opened; what cannot becomes a problem."""
    if path.is_dir() and not (path / SINGLE).is_file() and (path / INDEX).is_file():
        found.kind, found.title = SAFETENSORS, TITLES[SAFETENSORS]
        return _shards(found, path)
    try:
        rows = found.config and found.config.vocab_size
        checkpoint = open_checkpoint(path, allow_pickle=allow_pickle, vocab_size=rows)
    except GemmakitError as error:
        found.title = _guess(path)
        found.problems.append(Problem(path.name, None, None, None, str(error)))
        return None
    found.kind, found.title = checkpoint.kind, TITLES[checkpoint.kind]
    if (path / INDEX).is_file():
        found.notes.append(f"{INDEX} is there too, and not read: {SINGLE} comes first")
    _own_config(found, checkpoint)
    return checkpoint


def _guess(path: Path) -> str:
    """What a file that cannot be opened calls itself."""
    endings = {".safetensors": "safetensors", ".gguf": "GGUF", ".msgpack": "Flax msgpack", ".ckpt": "PyTorch pickle",
               ".bin": "PyTorch pickle", ".pt": "PyTorch pickle"}  # fmt: skip
    return endings.get(path.suffix, "no checkpoint that can be opened")


def _own_config(found: Findings, checkpoint: Checkpoint) -> None:
    """The configuration that weights hold themselves, or that follows from their being of a released size."""
    file = checkpoint._files[0]
    try:
        if isinstance(file, OrbaxFile) and found.config is None:
            found.config = file.config()
        elif found.kind == GGUF:
            found.config = GemmaConfig.from_dict(config_values(read_gguf_header(file.path)))
    except GemmakitError as error:
        found.problems.append(Problem(file.path.name, None, None, None, str(error)))
    size = released_size(checkpoint.shapes())
    if found.config is None and size is not None and not found.problems:
        found.config = GemmaConfig.preset(size)
        found.notes.append(f"no config.json: compared with Gemma {size.upper()}, which has the same width")


def _shards(found: Findings, folder: Path) -> Checkpoint | None:
    """Every shard for itself, so that one report names everything that is wrong with any of them."""
    try:
        weight_map = read_index(folder / INDEX)
    except CheckpointError as error:
        found.problems.append(Problem(INDEX, None, None, None, str(error)))
        return None
    files: dict[str, SafetensorsFile] = {}
    for shard in dict.fromkeys(weight_map.values()):
        count = sum(where == shard for where in weight_map.values())
        try:
            if not (folder / shard).is_file():
                found.problems.append(Problem(shard, None, f"a file with {count} tensors ({INDEX} names it)", "none"))
            else:
                files[shard] = SafetensorsFile(folder / shard)
        except CheckpointError as error:
            found.problems.append(Problem(shard, None, None, None, str(error)))
    for name, shard in weight_map.items():
        if shard in files and name not in files[shard].tensors:
            found.problems.append(Problem(shard, name, f"the tensor that {INDEX} places here", "nothing"))
    for shard, file in files.items():
        for name in file.tensors:
            if weight_map.get(name) != shard:
                placed = weight_map.get(name, "nowhere")
                found.problems.append(Problem(shard, name, f"no such tensor ({INDEX} places it {placed})", "one"))
    try:
        return Checkpoint([*files.values()]) if files else None
    except CheckpointError as error:
        found.problems.append(Problem(INDEX, None, None, None, str(error)))
        return None


# -- what it holds -----------------------------------------------------------------------------------------------------


def _describe(found: Findings, checkpoint: Checkpoint) -> None:
    found.tensors = {name: checkpoint.info(name) for name in checkpoint.names()}
    found.architecture = architecture_of(found.config, found.tensors)
    found.tensor_bytes = checkpoint.total_bytes
    if checkpoint.left_out:
        found.notes.append(f"{len(checkpoint.left_out)} tensors that only images need are left out")
    for info in found.tensors.values():
        found.dtypes[info.dtype] = found.dtypes.get(info.dtype, 0) + prod(info.shape)
    found.files = [
        (f.path.name, _size(f.path), len(f.tensors)) for f in checkpoint._files
    ]  # fmt: skip
    if found.kind == GGUF:
        _as_gguf_has_it(found, checkpoint.files[0])
    found.quantization = _quantization(found)
    wanted = _wanted(found)
    found.parameters = sum(map(prod, wanted.values())) if wanted else sum(found.dtypes.values())


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _as_gguf_has_it(found: Findings, path: Path) -> None:
    """The types and bytes in the file, instead of those that its blocks are given out with."""
    found.dtypes.clear()
    header = read_gguf_header(path)
    for theirs, held in header.tensors.items():
        if is_setting(header, theirs):
            continue
        info = TensorInfo(held.kind.name, tuple(held.shape), held.begin, held.end)
        found.tensors[released_name(theirs, header.require_gemma()) or theirs] = info
        found.dtypes[info.dtype] = found.dtypes.get(info.dtype, 0) + prod(info.shape)
    found.tensor_bytes = sum(info.nbytes for info in found.tensors.values())


def _quantization(found: Findings) -> str | None:
    settings = found.config.extra.get("quantization_config") if found.config else None
    if not isinstance(settings, dict):
        return None
    bits = next((n for n in (4, 8) if settings.get(f"load_in_{n}bit") is True), None)
    if bits is not None:
        kind = settings.get("bnb_4bit_quant_type") if bits == 4 else None  # there with 8 bits too, and means nothing
        settings = {**settings, "bits": bits, "bnb_4bit_quant_type": kind}
    shown = [f"{key.removeprefix('bnb_4bit_')} {settings[key]}"
             for key in ("bits", "group_size", "head_bits", "bnb_4bit_quant_type")
             if settings.get(key) is not None]  # fmt: skip
    own = settings.get("module_formats")
    if isinstance(own, dict):
        shown += [f"{kind} in {len(names)} modules" for kind, names in own.items() if isinstance(names, list)]
    return ", ".join([str(settings.get("quant_method", "unknown")), *shown])


# -- whether it is whole -----------------------------------------------------------------------------------------------


def _wanted(found: Findings) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(found.config, found.architecture or "GemmaForCausalLM") if found.config else {}


def _compare(found: Findings) -> None:
    """Names and shapes against the configuration; what an unreadable shard would have held is not said again."""
    wanted = _wanted(found)
    if not wanted:
        if not any(problem.file == "config.json" for problem in found.problems):
            found.notes.append("no config.json: the tensors are compared with no model")
        return
    held, parts = _plain(found, wanted)
    assert found.config is not None
    tied = tied_names(found.config, found.architecture or "GemmaForCausalLM")
    told = differences(wanted, {name: shape for name, shape in held.items() if name not in parts}, tied, heads=False)
    unread = any(problem.file.endswith(".safetensors") and problem.tensor is None for problem in found.problems)
    named = {problem.tensor for problem in found.problems}
    file = _holder(found)
    lines = [(name, _spelled(wanted[name]), "nothing") for name in (() if unread else told.missing)]
    lines += [(name, "no such tensor", _spelled(held[name])) for name in told.unexpected]
    found.problems += [Problem(file, *line) for line in lines if line[0] not in named]
    shapes = told.misshapen.items()
    found.problems += [Problem(file, name, _spelled(wants), _spelled(has)) for name, (has, wants) in shapes]


def _plain(found: Findings, wanted: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """name -> shape with quantized matrices as they would be, and the tensors that only say how to read those.

    gemmakit's codes are checked too; what another package packed is left to it.
    """
    shapes = {name: tuple(info.shape) for name, info in found.tensors.items()}
    if found.quantization is None or found.kind == GGUF:
        return shapes, set()
    parts: set[str] = set()
    for name, shape in wanted.items():
        stem = name.removesuffix("weight")
        own = {n for n in (f"{name}_scale", f"{name}_zero") if n in shapes}
        foreign = {n for n in shapes if n.startswith(f"{name}.") or n in (f"{stem}SCB", f"{stem}weight_format")}
        parts |= own | foreign
        coded = name in shapes and found.tensors[name].dtype in ("int8", "uint8") and not foreign
        if coded:
            _check_codes(found, name, shape, sorted({name} | own))
        if coded or (foreign and name in shapes):
            shapes[name] = shape
    return shapes, parts


def _check_codes(found: Findings, name: str, shape: tuple[int, ...], held: list[str]) -> None:
    assert found.config is not None
    try:
        promised = _promised(found.config, name, shape)
    except GemmakitError as error:
        found.problems.append(Problem("config.json", name, None, None, f"config.json: {error}"))
        return
    there = {part: (found.tensors[part].dtype, tuple(found.tensors[part].shape)) for part in held}
    for part in promised | there:
        said = [
            f"{held[0]} of {_spelled(held[1])}" if held else "nothing" for held in (promised.get(part), there.get(part))
        ]
        if said[0] != said[1]:
            found.problems.append(Problem(_holder(found), part, *said))


def _promised(config: GemmaConfig, name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of what config.json says that this weight is stored as."""
    settings = WeightOnlyConfig.from_dict(config.extra["quantization_config"])
    layout = settings.layout_of(name.removesuffix(".weight"), config.tie_word_embeddings)
    if layout is None or len(shape) < 2:
        return {}
    rows, columns = as_matrix(shape)
    return {name + part: held for part, held in stored_parts(rows, columns, *layout).items()}


def _holder(found: Findings) -> str:
    return found.files[0][0] if len(found.files) == 1 else Path(found.path).name


def _spelled(shape: tuple[int, ...]) -> str:
    return "shape " + "x".join(map(str, shape)) if shape else "a number"


def _scan(found: Findings, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None) -> None:
    """NaN and infinity, a few million numbers at a time."""
    found.scanned = True
    floats = {name: info for name in checkpoint if "float" in (info := checkpoint.info(name)).dtype}
    done, total = 0, sum(info.nbytes for info in floats.values())
    for name, info in floats.items():
        file = checkpoint.place(name)[0].path.name
        try:
            bad = 0
            for part in _pieces(checkpoint.tensor(name)):
                bad += _not_finite(part)
                done += part.nbytes
                if progress is not None:
                    progress(done, total)
        except GemmakitError as error:
            found.problems.append(Problem(file, name, None, None, f"{file}: {name}: {error}"))
            continue
        if bad:
            said = f"{bad} of {prod(info.shape)} NaN or infinite"
            found.problems.append(Problem(file, name, "finite numbers", said))


def _not_finite(tensor: Any) -> int:
    import torch

    return int((~torch.isfinite(tensor)).sum())


def _pieces(tensor: Any) -> Iterator[Any]:
    rows = max(1, _SCAN_ELEMENTS // max(1, prod(tensor.shape[1:])))
    if tensor.ndim == 0:
        yield tensor
    for begin in range(0, len(tensor) if tensor.ndim else 0, rows):
        yield tensor[begin : begin + rows]
