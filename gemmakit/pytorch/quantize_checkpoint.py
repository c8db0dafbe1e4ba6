"""A checkpoint in, a quantized checkpoint out, a tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gemmakit.checkpoint import Checkpoint, LazyTensor, open_checkpoint, require_memory, save_checkpoint
from gemmakit.checkpoint.layout import as_matrix, differences, warn_of_copies
from gemmakit.checks import Real, check
from gemmakit.config import GemmaConfig
from gemmakit.dtypes import dtype_name
from gemmakit.errors import ConfigError, InputError
from gemmakit.family import member_class, role_of
from gemmakit.hub import HubOptions, find_file, local_directory
from gemmakit.pytorch.heads import GemmaForCausalLM, GemmaForSequenceClassification, GemmaForTokenClassification
from gemmakit.pytorch.kernels import PackedWeight
from gemmakit.pytorch.model import GemmaModel
from gemmakit.pytorch.pretrained import GemmaPreTrainedModel, wanted_shapes
from gemmakit.pytorch.quantize import budget, rounding
from gemmakit.pytorch.quantize.gptq import calibrate, head_weight, memory_bytes
from gemmakit.pytorch.quantize.loading import is_taken, replace_with_quantized, require_known
from gemmakit.pytorch.quantize.modules import TABLES
from gemmakit.pytorch.quantize.own import WeightOnlyQuantizer
from gemmakit.pytorch.quantize.self_calibration import written_ids
from gemmakit.quantization import WeightOnlyConfig, parse_quantization

# What a folder of a model holds beside its weights and config.json.
BESIDE = (
    "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
# By role, the classes that a checkpoint may name; any other is taken for the first.
_CLASSES: dict[str, type[GemmaPreTrainedModel]] = {
    "causal_lm": GemmaForCausalLM,
    "model": GemmaModel,
    "sequence_classification": GemmaForSequenceClassification,
    "token_classification": GemmaForTokenClassification,
}
# Of a budget: what the smallest and the largest format take.
BITS = Real(4.2, 8.5)
# Beside tensors: interpreter, torch, and pieces in work.
_SLACK_BYTES = 300_000_000
Name = str | os.PathLike[str]
# Called with what is at hand, and the bytes of the checkpoint that are done and that there are.
Progress = Callable[[str, int, int], None]


def quantize_checkpoint(
    pretrained_model_name_or_path: Name,
    save_directory: Name,
    quantization_config: WeightOnlyConfig | dict[str, Any] | str = "int4",
    *,
    bits: float | None = None,
    calibration_ids: Tensor | Literal["self"] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    allow_pickle: bool = False,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Path:
    """Quantize a model's weights into a folder that `from_pretrained` opens, tokenizer files included.

    Weights are read, rounded and written one at a time: beside the largest one, memory holds only scales. With
    `calibration_ids` a layer at a time: see `gemmakit.pytorch.quantize.gptq`.

    Args:
        pretrained_model_name_or_path: a folder, or "owner/name" on the Hub; its weights must be plain.
        save_directory: the folder, made if absent.
        quantization_config: a WeightOnlyConfig, its dictionary, or a short name ("int8", "int4", "int4-g128").
        bits: how many a weight may take in all, scales and zeros included, 4.2 to 8.5. Which module gets which format
            is chosen for the least loss (see `gemmakit.pytorch.quantize.budget`) and written to `module_formats`. The
            configuration then says what else there is to say, not bits, groups or the head.
        calibration_ids: (R, S) token ids, R texts of S tokens, to choose codes by their effect on (GPTQ). "self": texts
            that the model first writes, from its weights in int8. None rounds each weight to its nearest code.
        overwrite: replace a model that is in the folder.
        max_shard_size: bytes a file, as a number or "5GB".
        allow_pickle: read pytorch_model.bin, with torch's restricted unpickler, when there is nothing better.
        progress: called with the tensor's or layer's name, and how many bytes of the checkpoint are done, of how many;
            before that with "writing", and how many texts.
        kwargs: revision, token, cache_dir, local_files_only, subfolder.

    Returns:
        The folder.

    Raises:
        InputError: weights that are quantized already, a folder in use, another scheme than gemmakit's own.
        CheckpointError: files missing or damaged, NaN in a weight, too little disk; nothing has then changed.
        NotEnoughMemory, HubError, UnsafeFile, ConfigError.
    """
    hub = HubOptions.take(kwargs)
    if isinstance(calibration_ids, str) and calibration_ids != "self":
        raise InputError(f'calibration_ids is {calibration_ids!r}: give token ids (R, S), "self" or None.')
    if kwargs:
        raise InputError(f"quantize_checkpoint has no argument {', '.join(kwargs)}.")
    source, target = pretrained_model_name_or_path, Path(save_directory).expanduser()
    wanted = _wanted(quantization_config if bits is None else _unsaid(quantization_config), calibration_ids is not None)
    if bits is not None:
        check("bits", bits, BITS, ConfigError)
    _refuse_target(source, target, overwrite)
    config = GemmaConfig.from_pretrained(source, **vars(hub))
    if config.extra.get("quantization_config") is not None:
        method = config.extra["quantization_config"].get("quant_method", "another library")
        raise InputError(f"{source} is quantized by {method} already: quantize the weights it was made from.")
    if calibration_ids is not None and config.enable_moe_block:
        raise InputError(
            f"the model has {config.num_experts} experts in each layer, of which a text reaches few with enough of its "
            "tokens to calibrate them: leave calibration_ids out (--calibrate)."
        )
    quantizer = WeightOnlyQuantizer(wanted, config.tie_word_embeddings)
    report = progress or (lambda *_: None)
    with open_checkpoint(source, hub, allow_pickle=allow_pickle) as checkpoint:
        hollow = _hollow(config)
        stored = _stored(hollow, checkpoint)
        require_known(wanted, [name.removesuffix(".weight") for name in stored if is_taken(hollow, name, quantizer)])
        model = None
        if isinstance(calibration_ids, str):
            calibration_ids = _written(type(hollow), source, report, allow_pickle=allow_pickle, **vars(hub))
        if calibration_ids is not None:
            model = type(hollow).from_pretrained(source, allow_pickle=allow_pickle, **vars(hub))
        if bits is not None:
            wanted.module_formats = _formats(bits, hollow, model, stored, checkpoint, quantizer, calibration_ids)
        if model is None or calibration_ids is None:
            tensors = _streamed(hollow, stored, checkpoint, quantizer, report)
        else:
            tensors = _calibrated(model, stored, checkpoint, quantizer, calibration_ids, report)
        config.extra["quantization_config"] = wanted.to_dict()
        files: dict[str, str | bytes] = {"config.json": config.to_json_string(), **_beside(source, hub)}
        save_checkpoint(tensors, target, max_shard_size=max_shard_size, extra_files=files)
    return target


def _wanted(config: Any, calibrated: bool) -> WeightOnlyConfig:
    wanted = parse_quantization(config)
    if not isinstance(wanted, WeightOnlyConfig):
        raise InputError(
            f"quantize_checkpoint writes gemmakit's own int8 and int4, not {wanted.quant_method}: for that, load with "
            "quantization_config= and call save_pretrained."
        )
    wanted.calibration = "gptq" if calibrated else None
    return wanted


def _written(kind: type[GemmaPreTrainedModel], source: Name, report: Progress, **how: Any) -> Tensor:
    if not issubclass(kind, GemmaForCausalLM):
        raise InputError(f"{source} is a {kind.__name__}, which writes no text to calibrate on: pass calibration_ids.")
    return written_ids(kind.from_pretrained(source, quantization_config="int8", **how), report)


def _unsaid(config: Any) -> Any:
    """The configuration beside a budget, which leaves nothing to say of bits and groups."""
    if config == "int4":
        return config  # what is taken where nothing is said
    wanted, plain = parse_quantization(config), WeightOnlyConfig(bits=4)
    for name in ("bits", "group_size", "head_bits", "head_group_size", "module_formats"):
        if getattr(wanted, name, None) not in (getattr(plain, name), getattr(WeightOnlyConfig(), name)):
            raise InputError(
                f"bits is given, and {name} of quantization_config is {getattr(wanted, name)}: the budget decides the "
                "formats. Leave one of them out."
            )
    return {**wanted.to_dict(), "bits": plain.bits, "group_size": plain.group_size}


def _formats(
    bits: float,
    hollow: Any,
    model: Any,
    stored: dict[str, str],
    checkpoint: Checkpoint,
    quantizer: WeightOnlyQuantizer,
    ids: Tensor | None,
) -> dict[str, list[str]]:
    """`module_formats` for a budget; model: with its weights, if `ids` are there to run through it."""
    names = [name for name in stored if is_taken(hollow, name, quantizer)]
    taken = {name.removesuffix(".weight"): name for name in names if quantizer.layout(name.removesuffix(".weight"))}
    reach: dict[str, list[budget.Effect]] = {}
    if ids is not None and isinstance(model, GemmaForCausalLM):
        require_memory(
            budget.memory_bytes(model.config, ids) + _SLACK_BYTES,
            f"measuring what errors of {checkpoint.files[0].parent}'s weights cost on a text",
            remedy="Leave calibration out, or name one format for all (--int4, --int6).",
        )
        reach = budget.effects(model, ids, lambda name: name in taken or f"{name}.weight" in model.tied_weights)
    found, weights = {}, 0
    for module, name in taken.items():
        tensor = checkpoint.tensor(stored[name])
        matrix = tensor.view(as_matrix(tensor.shape))
        found[module] = budget.costs(matrix, reach.get(module) if reach else None, name)
        weights += matrix.numel()
    return budget.module_formats(budget.choose(found, weights, bits))


def _refuse_target(source: Name, target: Path, overwrite: bool) -> None:
    here = local_directory(source)
    if here is not None and target.exists() and here.resolve() == target.resolve():
        raise InputError(f"{str(target)!r} is the model that is read: name another folder.")
    if target.is_file() or (not overwrite and target.is_dir() and any(target.iterdir())):
        kind = "is a file" if target.is_file() else "is not empty"
        raise InputError(f"{str(target)!r} {kind}: name another folder, or pass overwrite=True (--overwrite).")


def _beside(source: Name, hub: HubOptions) -> dict[str, bytes]:
    found = {name: find_file(source, name, hub, optional=True) for name in BESIDE}
    return {name: path.read_bytes() for name, path in found.items() if path is not None}


def _hollow(config: GemmaConfig) -> Any:
    """The model of the checkpoint's class, without memory for its weights."""
    roles = [found[1] for name in config.architectures or () if (found := role_of(name))]
    with torch.device("meta"):
        return member_class(_CLASSES[roles[0] if roles else "causal_lm"], config.model_type)(config)


def _stored(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name -> tensor name, once every difference between model and file has been named."""
    tied = model.tied_weights if model.config.tie_word_embeddings else {}
    found = differences(wanted_shapes(model), checkpoint.shapes(), tied)
    found.refuse(checkpoint.where, type(model).__name__)
    found.warn(checkpoint.where, type(model).__name__, stacklevel=3)
    warn_of_copies(checkpoint, found.copies, stacklevel=3)
    return found.names


# -- each weight by itself ---------------------------------------------------------------------------------------------


def _streamed(
    model: Any, stored: dict[str, str], checkpoint: Checkpoint, quantizer: WeightOnlyQuantizer, report: Progress
) -> dict[str, LazyTensor]:
    out: dict[str, LazyTensor] = {}
    done = _Done(report, checkpoint.total_bytes)
    largest = tables = 0
    for name, key in stored.items():
        owner = name.removesuffix(".weight")
        info = checkpoint.info(key)
        layout = quantizer.layout(owner) if is_taken(model, name, quantizer) else None
        if layout is None:
            load = _Plain(key, checkpoint, done)
            out[key] = LazyTensor(info.dtype, tuple(info.shape), load)
            largest = max(largest, info.nbytes)
            continue
        weight = _Weight(key, layout, checkpoint, done)
        O, I = as_matrix(info.shape)
        like = rounding.empty(O, I, *layout, device="meta")
        for part, tensor, field in _parts(key, like):
            out[part] = LazyTensor(dtype_name(tensor.dtype), tuple(tensor.shape), getattr(weight, field))
        largest, tables = max(largest, like.nbytes), tables + like.nbytes - like.codes.nbytes
    require_memory(largest + tables + _SLACK_BYTES, f"quantizing {checkpoint.files[0].parent}")
    return out


def _parts(key: str, packed: PackedWeight) -> Iterator[tuple[str, Tensor, str]]:
    """(stored name, tensor, field) of what a packed weight consists of."""
    names = zip((key, *(key + table for table in TABLES)), packed[:3], ("codes", "scale", "zero"), strict=True)
    return ((name, tensor, field) for name, tensor, field in names if tensor is not None)


class _Done:
    """Bytes of the checkpoint that have been worked through."""

    def __init__(self, report: Progress, total: int):
        self.report, self.total, self.bytes = report, total, 0

    def add(self, name: str, nbytes: int) -> None:
        self.bytes += nbytes
        self.report(name, self.bytes, self.total)


class _Plain:
    """A tensor that is copied."""

    def __init__(self, key: str, checkpoint: Checkpoint, done: _Done):
        self.key, self.checkpoint, self.done = key, checkpoint, done

    def __call__(self) -> Tensor:
        self.done.add(self.key, self.checkpoint.info(self.key).nbytes)
        return self.checkpoint.tensor(self.key)


class _Weight:
    """A weight's parts, each made when its turn to be written comes.

    A file begins with its widest numbers, so scales are asked for long before their codes: scales and zeros are kept
    from then on, and the codes, which are most of the bytes, are found again from them.
    """

    def __init__(self, key: str, layout: tuple[int, int | None], checkpoint: Checkpoint, done: _Done):
        self.key, self.layout, self.checkpoint, self.done = key, layout, checkpoint, done
        self.tables: tuple[Tensor, Tensor | None] | None = None

    def scale(self) -> Tensor:
        return self._tables()[0]

    def zero(self) -> Tensor | None:
        return self._tables()[1]

    def codes(self) -> Tensor:
        (scale, zero), self.tables = self._tables(), None
        codes = rounding.codes_of(self._matrix(), *self.layout, scale, zero)
        self.done.add(self.key, self.checkpoint.info(self.key).nbytes)
        return codes

    def _tables(self) -> tuple[Tensor, Tensor | None]:
        if self.tables is None:
            self.tables = rounding.tables_of(self._matrix(), *self.layout, self.key)
        return self.tables

    def _matrix(self) -> Tensor:
        tensor = self.checkpoint.tensor(self.key)
        return tensor.view(as_matrix(tensor.shape)) if tensor.ndim > 2 else tensor


# -- by what the codes do to a text ------------------------------------------------------------------------------------


def _calibrated(
    model: Any,
    stored: dict[str, str],
    checkpoint: Checkpoint,
    quantizer: WeightOnlyQuantizer,
    ids: Tensor,
    report: Progress,
) -> dict[str, Tensor]:
    require_memory(
        memory_bytes(model.config, ids, 8 if quantizer.config.module_formats else quantizer.config.bits) + _SLACK_BYTES,
        f"calibrating {checkpoint.files[0].parent} on {ids.numel()} tokens",
        remedy="Calibrate on fewer texts, or leave calibration out.",
    )
    done = _Done(report, checkpoint.total_bytes)
    sizes = {name: checkpoint.info(key).nbytes for name, key in stored.items()}
    head = "lm_head.weight" if isinstance(model, GemmaForCausalLM) else ""
    if model.config.tie_word_embeddings:
        head = model.tied_weights.get(head, "")
    for name in sorted(stored, key=lambda name: name != head):  # the head first, while the model is plain
        if "layers." not in name and name.endswith(".weight"):
            tensor: Any = model.get_parameter(name)
            layout = quantizer.layout(name.removesuffix(".weight"))
            # In 8 bits the nearest codes lose nothing that choosing others could win back.
            if name == head and layout is not None and layout[0] < 8:
                packed = head_weight(model, ids, layout)
                tensor = dict(zip(("weight", *("weight" + table for table in TABLES)), packed[:3], strict=True))
            replace_with_quantized(quantizer, model, name, tensor, model.device, None)
            done.add(name, sizes[name])
    model._set_quantizer(quantizer)
    model.tie_weights()
    calibrate(
        model, ids, quantizer, lambda at: done.add(at, sum(n for k, n in sizes.items() if k.startswith(at + ".")))
    )
    return _by_stored_name(model.state_dict(), stored)


def _by_stored_name(state: dict[str, Tensor], stored: dict[str, str]) -> dict[str, Tensor]:
    """What a file holds of a model's tensors, under the names of the file that the weights came from."""
    renamed = {name + table: key + table for name, key in stored.items() for table in ("", *TABLES)}
    return {renamed[name]: tensor for name, tensor in state.items() if name in renamed}
