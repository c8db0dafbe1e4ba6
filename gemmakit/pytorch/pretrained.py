"""Weights in and out of the PyTorch models: initialise, load, save."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gemmakit.checkpoint import Checkpoint, open_checkpoint, require_memory, save_checkpoint
from gemmakit.checkpoint.formats.gguf import GgufFile
from gemmakit.checkpoint.formats.state_dict import StateDict
from gemmakit.checkpoint.layout import HEADS, Differences, differences, stored_names, warn_of_copies
from gemmakit.checkpoint.readahead import fault_in, read_ahead
from gemmakit.checkpoint.settings import config_for, generation_for
from gemmakit.checks import Accepted, take_accepted
from gemmakit.config import GemmaConfig
from gemmakit.dtypes import dtype_name
from gemmakit.errors import InputError, NotEnoughMemory
from gemmakit.family import KINDS, member_class
from gemmakit.generation import GenerationConfig
from gemmakit.gguf import read_gguf_header
from gemmakit.gguf_settings import matrices_dtype
from gemmakit.hub import HubOptions, find_gguf, push_saved, refuse_code
from gemmakit.pytorch import per_layer
from gemmakit.pytorch.adapters.methods import AdapterMethods
from gemmakit.pytorch.attention import implementation
from gemmakit.pytorch.experts import GemmaExperts
from gemmakit.pytorch.methods import ModelMethods, assign
from gemmakit.pytorch.parallel.processes import local_device, rank, require_whole
from gemmakit.pytorch.parallel.sharded import is_sharded, save_together
from gemmakit.pytorch.parallel.tensor import TensorPlan, tensor_plan
from gemmakit.pytorch.placement import DeviceMap, MaxMemory, one_device, spread
from gemmakit.pytorch.quantize import (
    QuantizedMethods,
    Quantizer,
    quantizer_for,
    replace_with_quantized,
    stored_parts,
    unpacked_shapes,
)
from gemmakit.pytorch.stored import stored_tensors

Model = TypeVar("Model", bound="GemmaPreTrainedModel")

# What transformers' calls give: arguments that ask for what is always so, or for nothing.
_LOADING: Accepted = {
    "low_cpu_mem_usage": (None, ""),
    "use_safetensors": (None, ""),
    "offload_state_dict": (None, ""),
    "offload_buffers": (None, ""),
    "weights_only": ((None, True), "pickles are never executed; allow_pickle=True reads their tensors"),
    "key_mapping": ((None,), "rename the tensors in the file, or load them and call load_state_dict"),
    "use_kernels": (
        (None, False),
        "kernels are gemmakit's own and chosen by themselves; model.decode_plan() says which",
    ),
    "adapter_kwargs": ((None,), "load the adapter with gemmakit.pytorch.adapters.load_adapter(model, folder)"),
}
_SAVING: Accepted = {
    "safe_serialization": ((None, True), "only safetensors are written; torch.save(model.state_dict(), path) pickles"),
    "save_function": (None, ""),
    "variant": ((None,), "save into a folder of its own"),
    "save_peft_format": (None, ""),
}
# What older code passes, and what says it now.
_INSTEAD = {
    "use_auth_token": "token=",
    "load_in_8bit": 'quantization_config="int8"',
    "load_in_4bit": 'quantization_config="int4", or BitsAndBytesConfig(load_in_4bit=True)',
    "from_flax": "gemmakit convert",
}


class GemmaPreTrainedModel(AdapterMethods, QuantizedMethods, ModelMethods):
    """What every Gemma model can do besides its forward pass."""

    generation_config: GenerationConfig
    tensor_parallel: TensorPlan | None = None  # of a model that is a part of one

    def __init__(self, config: GemmaConfig):
        super().__init__()
        if not isinstance(config, GemmaConfig):
            raise InputError(f"config is a {type(config).__name__}; give a GemmaConfig, or use from_pretrained.")
        member_class(type(self), config.model_type)  # refuses another member's
        self.config = copy.deepcopy(config)
        self.config.attn_implementation = implementation(config.attn_implementation)
        self.gradient_checkpointing = False
        self.checkpointing_arguments = {"use_reentrant": False}
        self.name_or_path = config.name_or_path

    # -- fresh weights ---------------------------------------------------------------------------------------------

    def post_init(self) -> None:
        """Called at the end of a class's __init__: fresh weights, ties, generation defaults."""
        self.init_weights()
        self.tie_weights()
        self.generation_config = GenerationConfig.from_model_config(self.config)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, initializer_range) for matrices; zero for biases, norms (1 + w multiplies) and the padding row."""
        children = [m for m in self.children() if isinstance(m, GemmaPreTrainedModel)]  # these did their own
        done = {id(module) for child in children for module in child.modules()}
        for module in self.modules():
            if id(module) not in done:
                _init_module(module, self.config.initializer_range)

    # -- in --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: GemmaConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: DeviceMap = None,
        max_memory: MaxMemory = None,
        offload_folder: str | os.PathLike[str] | None = None,
        attn_implementation: str | None = None,
        allow_pickle: bool = False,
        ignore_mismatched_sizes: bool = False,
        quantization_config: Any = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        output_loading_info: bool = False,
        tp_plan: str | None = None,
        device_mesh: Any = None,
        **kwargs: Any,
    ) -> Model:
        """Load a model in evaluation mode from a folder (safetensors, Flax msgpack, Orbax), the Hub or a GGUF file.

        On the CPU the weights stay mapped from the file when their dtype is kept: loading takes no memory for them.

        Args:
            pretrained_model_name_or_path: a folder, a .gguf file, or "owner/name" on the Hub. None goes with config and
                state_dict.
            config: instead of the config.json found there.
            dtype: a torch dtype or its name; "auto", the default, keeps what the checkpoint holds, of a GGUF file
                Q8_0, Q5_0 and Q4_0 blocks too. `torch_dtype` is the older name of the same.
            device_map: a device ("cpu", "cuda", "cuda:1", 0); "auto" for the first accelerator if there is one and the
                weights fit, otherwise all there are, then CPU memory; "balanced", "balanced_low_0", "sequential"; or
                {module name: device, "cpu" or "disk"}. More than one place needs the accelerate package.
            max_memory: {device: bytes or "10GiB"}, how much each place may hold.
            offload_folder: for modules that are sent to "disk".
            attn_implementation: "sdpa" (default), "eager", "flash_attention_2" or "flex_attention".
            allow_pickle: read pytorch_model.bin, with torch's restricted unpickler, when there is nothing better.
            ignore_mismatched_sizes: start a head of another shape afresh, with a warning, instead of refusing.
            quantization_config: quantize the weights while they are read: a WeightOnlyConfig or BitsAndBytesConfig,
                the dictionary of one, or "int8", "int6", "int5", "int4", "int4-g128", "int4-a8".
            state_dict: the weights, by their names, instead of those found there.
            output_loading_info: give (model, info) with the lists missing_keys, unexpected_keys, mismatched_keys,
                error_msgs.
            tp_plan: "auto" splits every layer over the processes that torchrun started, of which each reads its part of
                the file alone, and then runs the same calls (`parallel.tensor`). The configuration is that of its part.
            device_mesh: beside it, a DeviceMesh of one dimension: the processes that share this model.
            kwargs: revision, token, cache_dir, local_files_only, subfolder, variant; gguf_file, the name of a GGUF file
                of that folder or id; anything else overrides a field of the configuration.

        Raises:
            CheckpointError: files missing, damaged, or with tensors this model lacks, misses or shapes otherwise.
            UnsafeFile, HubError, NotEnoughMemory, ConfigError, MissingDependency.
        """
        refuse_code(kwargs)
        take_accepted(kwargs, _LOADING, InputError)
        if pretrained_model_name_or_path is None and (config is None or state_dict is None):
            raise InputError("there is no name to load from: give one, or config= and state_dict=.")
        name = pretrained_model_name_or_path or ""
        hub, variant = HubOptions.take(kwargs), kwargs.pop("variant", None)
        gguf = None if state_dict is not None else find_gguf(name, kwargs.pop("gguf_file", None), hub)
        config = config_for(gguf or name, config, HubOptions() if gguf else hub, kwargs, _INSTEAD)
        cls = member_class(cls, config.model_type)
        if attn_implementation is not None:
            config.attn_implementation = attn_implementation
        wanted = dtype_of(dtype or torch_dtype or "auto")
        if state_dict is not None:
            opened, stored = Checkpoint([StateDict(state_dict)]), None
        elif gguf is None:
            options: dict[str, Any] = dict(allow_pickle=allow_pickle, variant=variant, vocab_size=config.vocab_size)
            opened, stored = open_checkpoint(name, hub, **options), None
        else:
            file = _gguf_file(gguf, wanted, quantization_config)
            opened, stored = Checkpoint([file]), file.quantization
            wanted = wanted or dtype_of(matrices_dtype(read_gguf_header(gguf)))
        quantizer = quantizer_for(config, quantization_config, HEADS, device_map, stored)
        with opened as checkpoint:
            device = one_device(device_map, max_memory, _size(checkpoint, wanted, quantizer))
            target = device or torch.device("cpu")
            plan = tensor_plan(tp_plan, config, target, device_mesh)
            if plan is not None and device is None:
                raise InputError(f"device_map={device_map!r} spreads layers and tp_plan splits them: give one of them.")
            target = target if plan is None else local_device(target)
            read_ahead([] if state_dict is not None or plan is not None else checkpoint.files)
            with torch.device("meta"):
                whole = cls(config)
                model = whole if plan is None else cls(plan.local_config())
            found = _load(model, whole, checkpoint, wanted, target, ignore_mismatched_sizes, quantizer, plan)
        model.config.dtype = dtype_name(model.dtype)
        model.name_or_path = str(gguf or name)
        if name:
            model.generation_config = generation_for(name, hub) or model.generation_config
        if device is None:
            assert isinstance(device_map, (str, Mapping))
            spread(model, device_map, max_memory, offload_folder)
        model.eval()
        return (model, found.info()) if output_loading_info else model  # pyright: ignore[reportReturnType]

    # -- out -------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write config.json, generation_config.json and safetensors, so that a reader finds the old or the new, whole.

        Args:
            save_directory: the folder, made if absent.
            max_shard_size: bytes a file, as a number or "5GB", "200MB".
            push_to_hub: afterwards upload the folder; token and kwargs go to `push_folder`.
            is_main_process: of several processes the one that writes; the others do nothing. A model that is shared
                out over processes (`parallel.sharded`) is saved by all of them together, whatever this says.
            state_dict: the weights, by the model's names, where they were gathered from several processes.

        Raises:
            InputError: a head that was changed apart from the embedding it is tied to, or offloaded weights.
            CheckpointError: the disk refuses.
        """
        take_accepted(kwargs, _SAVING, InputError)
        if state_dict is None:
            require_whole(self, "save one that is loaded without tp_plan")
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        together = is_sharded(tensors)
        if not is_main_process and not together:
            return
        if push_to_hub and token is not None:
            kwargs["token"] = token
        config = self.config
        config.architectures = [member_class(type(self), config.model_type).__name__]
        config.dtype = dtype_name(self.dtype)
        tensors = stored_tensors(self, tensors, _tied(self))
        if self._quantizer is None:
            config.extra.pop("quantization_config", None)
        else:
            config.extra["quantization_config"] = self._quantizer.to_dict()
        files = {
            "config.json": config.to_json_string(),
            "generation_config.json": self.generation_config.to_json_string(),
        }
        save = save_together if together else save_checkpoint
        save(tensors, Path(save_directory), max_shard_size=max_shard_size, extra_files=files)
        push_saved(Path(save_directory), push_to_hub and not (together and rank()), kwargs)


def _init_module(module: nn.Module, std: float, only: str | None = None) -> None:
    """Fresh values for a module's parameters, or for the one called `only`: its neighbour may come from a file."""
    if isinstance(module, GemmaExperts):
        for weight in module.parameters():
            weight.normal_(0.0, std)
    if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight.is_meta:
        return
    if not module.weight.is_floating_point():
        return  # codes
    if only != "bias":
        module.weight.normal_(0.0, std)
    if isinstance(module, nn.Linear) and module.bias is not None and only != "weight":
        module.bias.zero_()
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()


def _gguf_file(path: Path, dtype: torch.dtype | None, quantization_config: Any) -> GgufFile:
    """A GGUF file whose Q8_0, Q5_0 and Q4_0 stay as they are, unless a dtype or another quantization is asked for."""
    if quantization_config is not None:
        return GgufFile(path, "float32")  # what is rounded again is rounded from the exact numbers
    return GgufFile(path, None if dtype is None else dtype_name(dtype), keep_quantized=dtype is None)


def _load(
    model: GemmaPreTrainedModel,
    whole: GemmaPreTrainedModel,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device,
    ignore_mismatched: bool,
    quantizer: Quantizer | None,
    plan: TensorPlan | None,
) -> Differences:
    """Fill a model made on "meta" with the checkpoint's tensors; every difference is named, and given back.

    whole: the model that the checkpoint is of; the same, but under a plan, by which `model` is a part of it.
    """
    if quantizer is not None:
        quantizer.require(device)
    wanted, kind = wanted_shapes(whole), type(whole).__name__
    packed = stored_parts(quantizer, whole, checkpoint, stored_names(wanted, checkpoint))
    held = unpacked_shapes(quantizer, wanted, packed, checkpoint)
    found = differences(wanted, held, _tied(whole), ignore_mismatched=ignore_mismatched)
    found.refuse(checkpoint.where, kind)
    found.warn(checkpoint.where, kind, stacklevel=3)
    warn_of_copies(checkpoint, found.copies, stacklevel=3)
    if plan is not None and found.fresh:
        raise InputError(
            f"{checkpoint.where} holds no {', '.join(found.fresh)}, and fresh weights would differ from process to "
            "process: load it without tp_plan, save it, and load that."
        )
    _require_room(checkpoint, found.names.values(), dtype, device, quantizer, 1 if plan is None else plan.size)
    # bitsandbytes quantizes what comes from the CPU.
    source = "cpu" if quantizer is not None and quantizer.config.quant_method != "gemmakit" else device
    mapped: set[int] = set()

    def read(key: str, name: str) -> torch.Tensor:
        if plan is None:
            tensor = checkpoint.tensor(key, device=source)
        else:
            tensor = plan.read(checkpoint, key, name)
        tensor = tensor.contiguous()  # Flax has kernels the other way round
        mapped.add(tensor.data_ptr())
        return tensor

    for name, key in found.names.items():
        if name in packed:
            parts = {part: read(stored, name) for part, stored in packed[name].items()}
            replace_with_quantized(quantizer, model, name, parts, device, dtype)
            continue
        tensor = read(key, name)
        if not replace_with_quantized(quantizer, model, name, tensor, device, dtype):
            tensor = tensor.to(device).to(dtype if tensor.is_floating_point() else None)
            assign(model, name, tensor)
    _enter(model, mapped)
    model._set_quantizer(quantizer)
    complete(model, found.fresh, dtype, device)
    if plan is not None:
        plan.enter(model)
    return found


def wanted_shapes(model: GemmaPreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that a checkpoint of this model stores: all but the tied ones."""
    tied = _tied(model)
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}


def _enter(model: nn.Module, mapped: set[int]) -> None:
    """Bring in what the model keeps at addresses of the mapped file from now on, beside whatever comes next.

    A table of which a step reads a row a token stays in the file.
    """
    by_row = {id(t): module for module in per_layer.tables(model) for t in (*module.parameters(), *module.buffers())}
    kept: list[torch.Tensor] = []
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "cpu" or tensor.data_ptr() not in mapped:
            continue
        if id(tensor) in by_row:
            by_row[id(tensor)].stays_in_file = True
        else:
            kept.append(tensor)
    pieces = dict.fromkeys((t.data_ptr(), t.nbytes) for t in kept if t.nbytes)
    if pieces:
        fault_in(list(pieces), kept)


def _tied(model: GemmaPreTrainedModel) -> dict[str, str]:
    return dict(model.tied_weights) if model.config.tie_word_embeddings else {}


def _bytes(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None, quantizer: Quantizer | None) -> int:
    """Bytes of one tensor once it is loaded as `dtype` (None: as it is stored) or quantized."""
    info = checkpoint.info(name)
    stored = getattr(torch, info.dtype, None)
    if stored is None:
        return info.nbytes
    owner = name.removesuffix(".weight")
    if quantizer is not None and len(info.shape) > 1 and quantizer.takes(owner):
        return int(info.nbytes // stored.itemsize * quantizer.bits_of(owner) / 8)
    if dtype is None or not stored.is_floating_point:
        return info.nbytes
    return info.nbytes // stored.itemsize * dtype.itemsize


def _size(checkpoint: Checkpoint, dtype: torch.dtype | None, quantizer: Quantizer | None) -> int:
    """Bytes of all the checkpoint's tensors once they are loaded."""
    return sum(_bytes(checkpoint, name, dtype, quantizer) for name in checkpoint.names())


def _require_room(
    checkpoint: Checkpoint,
    names: Iterable[str],
    dtype: torch.dtype | None,
    device: torch.device,
    quantizer: Quantizer | None,
    parts: int,
) -> None:
    """parts: how many share the weights, this one among them."""

    def size(name: str) -> int:
        loaded = _bytes(checkpoint, name, dtype, quantizer)
        info = checkpoint.info(name)
        mapped = device.type == "cpu" and info.mapped and loaded == info.nbytes  # stays in the file
        return 0 if mapped else loaded

    needed = sum(size(n) for n in names) // parts
    if device.type == "cpu":
        require_memory(needed, f"{checkpoint.files[0].parent} as {dtype or 'stored'}")
    elif device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed > free:
            raise NotEnoughMemory(
                f"the weights need {needed / 1e9:.2f} GB on {device} and {free / 1e9:.2f} GB are free. "
                'Load a smaller dtype, quantize, or use device_map="cpu".'
            )


def complete(
    model: GemmaPreTrainedModel, fresh: Iterable[str], dtype: torch.dtype | None, device: torch.device
) -> None:
    """Initialise the parameters `fresh`, which no file held, restore ties, compute tables."""
    known = (p.dtype for p in model.parameters() if not p.is_meta and p.is_floating_point())
    like = next(known, torch.float32)
    for name in fresh:
        shape = model.get_parameter(name).shape
        assign(model, name, torch.empty(shape, dtype=dtype or like, device=device))
        with torch.no_grad():
            owner, _, only = name.rpartition(".")
            _init_module(model.get_submodule(owner), model.config.initializer_range, only)
    model.tie_weights()
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None and hasattr(module, "inv_freq"):
            reset(device)


def dtype_of(dtype: torch.dtype | str) -> torch.dtype | None:
    """A torch dtype; None for "auto". InputError for what is no floating one."""
    if dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype_name(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype is {dtype!r}; it must be 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


for _model_type in KINDS:  # by the members' names, as other libraries call it
    globals()[f"{KINDS[_model_type].classes['causal_lm'].removesuffix('ForCausalLM')}PreTrainedModel"] = (
        GemmaPreTrainedModel
    )
