"""gemmakit doctor: what this machine can run and by which path; or what a checkpoint is and whether it is whole."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import gemmakit
from gemmakit.auto import AutoConfig
from gemmakit.checkpoint.inspect import Findings, Problem, inspect, memory
from gemmakit.checkpoint.memory import free_memory_bytes
from gemmakit.cli import options as o
from gemmakit.cli.env import available_cores, cpu_flags, cpu_name, missing_extras, versions
from gemmakit.cli.shell import FAILED
from gemmakit.config import GemmaConfig
from gemmakit.conversion.sources import FILES
from gemmakit.dtypes import dtype_name
from gemmakit.errors import GemmakitError, InputError
from gemmakit.hub import demo_model, packaged_model
from gemmakit.progress import progress_bar
from gemmakit.text import GemmaTokenizerFast

# Instructions that multiply bfloat16 directly; without one of them it is emulated, slower than float32.
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16", "svebf16")
_BOLD, _GREEN, _RED = "1", "32", "31"  # on a terminal; plain in a pipe
_MANY_FILES = 8


def doctor(
    model: Annotated[
        str | None, Argument(help="File or folder to look into; a Hub id, or nothing, for what this machine can run.")
    ] = None,
    revision: o.Revision = None,
    tensors: Annotated[bool, Option("--tensors", help="List every tensor of the checkpoint.")] = False,
    deep: Annotated[
        bool, Option("--deep", help="Read every number of the checkpoint: none may be NaN or infinite.")
    ] = False,
    allow_pickle: Annotated[
        bool, Option("--allow-pickle", help="Look into a pickle that is found in a folder; nothing in it runs.")
    ] = False,
    json_: Annotated[bool, Option("--json", help="As a JSON object.")] = False,
) -> int:
    """Say what this machine can run, or whether a checkpoint is whole.

    Of a file or folder: what it is and holds, what it needs in memory, and every tensor that is missing, left over,
    misshapen or damaged, a line each; exit code 2 if there is any. Otherwise: devices and their memory, what the model
    needs of it in each dtype, which attention and decoding path is taken and why, and which packages are missing.
    """
    path = None if model is None else packaged_model(model) or Path(model).expanduser()
    if path is not None and path.exists():
        return _checkpoint(path, tensors, deep, allow_pickle, json_)
    if tensors or deep or allow_pickle:
        raise InputError("--tensors, --deep and --allow-pickle look into a file or folder: name one.")
    found = examine(model, revision)
    print(json.dumps(found, indent=2) if json_ else "\n".join(report(found)))
    return 0


def _checkpoint(path: Path, tensors: bool, deep: bool, allow_pickle: bool, json_: bool) -> int:
    with progress_bar("bytes") as progress:
        found = inspect(path, deep=deep, allow_pickle=allow_pickle, progress=progress)
    _inspect_tokenizer(found)
    print(json.dumps(found.to_dict(tensors), indent=2) if json_ else "\n".join(_lines(found, tensors)))
    return FAILED if found.problems else 0


def examine(model: str | None, revision: str | None) -> dict[str, Any]:
    """Everything the report says, as data."""
    name, config = read_config(model, revision)
    return {
        "versions": versions(),
        "missing_extras": missing_extras(),
        "cpu": cpu(),
        "accelerators": accelerators(),
        "model": needs(name, config),
        "paths": paths(config),
    }


def cpu() -> dict[str, Any]:
    import torch

    flags = cpu_flags()
    return {
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": available_cores(),
        "free_bytes": free_memory_bytes(),
        "bfloat16": [flag for flag in BF16_FLAGS if flag in flags],
        "vectors": str(torch.backends.cpu.get_cpu_capability()),
    }


def accelerators() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append({
            "device": f"cuda:{index}", "name": properties.name, "free_bytes": free, "total_bytes": total,
            "capability": f"{properties.major}.{properties.minor}", "bfloat16": properties.major >= 8,
        })  # fmt: skip
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": cpu_name(), "free_bytes": free_memory_bytes(), "bfloat16": True})
    return found


def read_config(name: str | None, revision: str | None) -> tuple[str, GemmaConfig]:
    """What to call a model, and its configuration; without a name the demo model, or 2B where there is no demo."""
    try:
        source = name or demo_model()
    except InputError:
        return "Gemma 2B", GemmaConfig.preset("2b")
    return name or "the demo model", AutoConfig.from_pretrained(source, revision=revision)


def needs(name: str, config: GemmaConfig) -> dict[str, Any]:
    """What a model of this configuration takes, in bytes a dtype."""
    return {
        "name": name,
        "parameters": _hollow(config).num_parameters(),
        "layers": config.num_hidden_layers,
        "context": config.max_position_embeddings,
        "stored_dtype": config.dtype,
        "bytes": memory(config),
    }


def paths(config: GemmaConfig) -> dict[str, Any]:
    """Which implementations run: of attention, and on the CPU of each of the model's matrices, by what takes it."""
    import torch

    from gemmakit.pytorch.attention import IMPLEMENTATIONS, implementation
    from gemmakit.pytorch.kernels import linear_plan

    chosen = implementation(config.attn_implementation)
    dtype = getattr(torch, config.dtype or "bfloat16")
    steps: dict[str, list[str]] = {}
    for name, weight in _matrices(_hollow(config)):
        alike = torch.empty((), dtype=dtype).expand(weight.shape)  # the shape on the CPU, without its memory
        steps.setdefault(str(linear_plan(alike)), []).append(name)
    return {
        "attention": chosen,
        "attention_others": [name for name in IMPLEMENTATIONS if name != chosen],
        "dtype": dtype_name(dtype),
        "cpu_step": steps,
    }


def _hollow(config: GemmaConfig) -> Any:
    """The model without any memory for its weights."""
    import torch

    with torch.device("meta"):
        return gemmakit.GemmaForCausalLM(config)


def _matrices(model: Any) -> Iterator[tuple[str, Any]]:
    """The matrices of one layer and the head, by their short names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith("_proj.weight") and ".layers.0." in name:
            yield name.split(".")[-2], parameter
        elif name == "lm_head.weight":
            yield "lm_head", parameter


# -- this machine ------------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> list[str]:
    versions = found["versions"]
    return [
        f"gemmakit {versions['gemmakit']}, Python {versions['python']}, torch {versions.get('torch', 'missing')}",
        "",
        "Devices",
        *_devices(found),
        "",
        *_model(found),
        "",
        *_paths(found["paths"]),
        "",
        *_extras(found["missing_extras"]),
    ]


def _devices(found: dict[str, Any]) -> list[str]:
    cpu = found["cpu"]
    native = f"in hardware ({', '.join(cpu['bfloat16'])})" if cpu["bfloat16"] else "emulated: float32 is faster"
    free, threads = _size(cpu["free_bytes"]), _several(cpu["threads"], "thread")
    lines = [
        f"  {'cpu':<10} {cpu['name']}",
        f"  {'':<10} {threads} on {_several(cpu['cores'], 'core')}, {free} free, {cpu['vectors']}",
        f"  {'':<10} bfloat16 {native}",
    ]
    for device in found["accelerators"]:
        bf16 = "in hardware" if device["bfloat16"] else "emulated: float16 is faster"
        lines += [
            f"  {device['device']:<10} {device['name']}, {_size(device['free_bytes'])} free",
            f"  {'':<10} bfloat16 {bf16}",
        ]
    if not found["accelerators"]:
        lines.append(f"  {'cuda, mps':<10} none that this torch sees")
    return lines


def _model(found: dict[str, Any]) -> list[str]:
    model = found["model"]
    stored = f", stored as {model['stored_dtype']}" if model["stored_dtype"] else ""
    lines = [
        f"Memory for {model['name']}",
        f"  {_count(model['parameters'])} parameters, {model['layers']} layers, context of {model['context']} tokens"
        + stored,
        "",
        f"  {'dtype':<10} {'weights':>10} {'per 1000 tokens':>17}   fits",
    ]
    rooms = [("cpu", found["cpu"]["free_bytes"]), *((d["device"], d["free_bytes"]) for d in found["accelerators"])]
    for dtype, sizes in model["bytes"].items():
        whole = sizes["weights"] + sizes["kv_per_1000_tokens"] * model["context"] // 1000
        fits = ", ".join(f"{name} {_verdict(sizes['weights'], whole, free)}" for name, free in rooms)
        lines.append(f"  {dtype:<10} {_size(sizes['weights']):>10} {_size(sizes['kv_per_1000_tokens']):>17}   {fits}")
    return lines


def _paths(found: dict[str, Any]) -> list[str]:
    lines = [
        "Paths",
        f"  attention  {found['attention']}; attn_implementation= also takes",
        f"             {', '.join(found['attention_others'])}",
        f"  a decoding step on the cpu in {found['dtype']}",
    ]
    for plan, names in found["cpu_step"].items():
        lines += textwrap.wrap(f"{plan}: {', '.join(names)}", 78, initial_indent=" " * 13, subsequent_indent=" " * 15)
    return lines


def _verdict(weights: int, whole: int, free: int | None) -> str:
    if free is None:
        return "unknown"
    return "yes" if whole <= free else "yes, not with a full context" if weights <= free else "no"


def _extras(missing: dict[str, list[str]]) -> list[str]:
    if not missing:
        return ["Packages: all there."]
    lines = ["Not installed, and needed only for what they name"]
    wide = max(len(", ".join(packages)) for packages in missing.values())
    for extra, packages in missing.items():
        lines.append(f"  {', '.join(packages):<{wide}}   pip install 'gemmakit[{extra}]'")
    return lines


def _several(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# -- a checkpoint ------------------------------------------------------------------------------------------------------


def _lines(found: Findings, tensors: bool) -> list[str]:
    """The whole report; the table of tensors if it is asked for."""
    return [
        f"{_bold(Path(found.path).resolve().name)}: {found.title}",
        *_about(found),
        *(["", *_memory(found)] if found.config is not None else []),
        *(["", *_table(found)] if tensors and found.tensors else []),
        "",
        *_wholeness(found),
    ]


def _about(found: Findings) -> list[str]:
    out: list[str] = []
    config = found.config
    if found.tensors:
        said = [found.architecture or "a Gemma", f"{_count(found.parameters)} parameters"]
        said += [f"{config.num_hidden_layers} layers", f"context {config.max_position_embeddings}"] if config else []
        out.append(_row("model", ", ".join(said)))
        out.append(_row("weights", f"{len(found.tensors)} tensors, {_size(found.tensor_bytes)}: {_dtypes(found)}"))
    if found.quantization:
        out.append(_row("quantized", found.quantization))
    for i, (name, length, count) in enumerate(found.files[:_MANY_FILES]):
        out.append(_row("" if i else "files", f"{name:<40} {_size(length):>9} {count:>6} tensor{'s' * (count != 1)}"))
    if len(found.files) > _MANY_FILES:
        out.append(_row("", f"and {len(found.files) - _MANY_FILES} more"))
    out.append(_row("tokenizer", _tokenizer(found)))
    return [*out, *(_row("note", note) for note in found.notes)]


def _tokenizer(found: Findings) -> str:
    tokenizer = found.tokenizer
    if tokenizer is None:
        return "none beside it"
    files = ", ".join(name for name in tokenizer["files"] if not name.endswith("config.json"))
    if not tokenizer["loads"]:
        return f"{files}: cannot be loaded"
    return f"{tokenizer['size']} ids, {'with' if tokenizer['chat_template'] else 'without'} a chat template"


def _dtypes(found: Findings) -> str:
    total = sum(found.dtypes.values()) or 1
    ordered = sorted(found.dtypes.items(), key=lambda item: -item[1])
    if len(ordered) == 1:
        return ordered[0][0]
    return ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in ordered)


def _memory(found: Findings) -> list[str]:
    assert found.config is not None
    out = [_bold("Memory"), f"  {'':<10} {'weights':>10} {'per 1000 tokens':>17}"]
    for name, sizes in memory(found.config, found.architecture).items():
        out.append(f"  {name:<10} {_size(sizes['weights']):>10} {_size(sizes['kv_per_1000_tokens']):>17}")
    return out


def _table(found: Findings) -> list[str]:
    wide = max(map(len, found.tensors))
    return [
        _bold("Tensors"),
        *(
            f"  {name:<{wide}}  {info.dtype:<9} {'x'.join(map(str, info.shape))}"
            for name, info in found.tensors.items()
        ),
    ]


def _wholeness(found: Findings) -> list[str]:
    if not found.problems:
        compared = "every tensor of the configuration is there" if found.config else "every file is readable"
        return [_style("Whole", _GREEN) + f": {compared}" + (", and every number finite." if found.scanned else ".")]
    count = len(found.problems)
    head = f"{_style('Not whole', _RED)}: {count} problem{'s' if count > 1 else ''}"
    return [head, *(f"  {problem.line()}" for problem in found.problems)]


def _row(name: str, text: str) -> str:
    return f"  {name:<10} {text}"


def _size(number: int | None) -> str:
    if number is None:
        return "unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.{2 if scale == 1e9 else 1}f} {unit}"
    return f"{number} B"


def _count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} billion"
    return f"{number / 1e6:.2f} million" if number >= 1e6 else str(number)


def _bold(text: str) -> str:
    return _style(text, _BOLD)


def _style(text: str, code: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


# -- the tokenizer beside it -------------------------------------------------------------------------------------------


def _inspect_tokenizer(found: Findings) -> None:
    """Load the tokenizer that lies beside the weights, once, and add what is known of it and what is wrong."""
    where = found.beside
    if where is None or (where.is_dir() and not any((where / name).is_file() for name in FILES[:2])):
        return
    files = [name for name in FILES if (where / name).is_file()] if where.is_dir() else [where.name]
    found.tokenizer = {"files": files, "loads": False, "size": None, "chat_template": None}
    _load_tokenizer(found, found.tokenizer, where)


def _load_tokenizer(found: Findings, about: dict[str, Any], where: Path) -> None:
    try:
        tokenizer: Any = GemmaTokenizerFast.from_pretrained(str(where))
        template = tokenizer.get_chat_template()
        about.update(loads=True, size=len(tokenizer), chat_template=template is not None)
        if template is not None:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except GemmakitError as error:
        found.problems.append(Problem("tokenizer", None, None, None, f"tokenizer: {error}"))
        return
    if found.config is not None and len(tokenizer) > found.config.vocab_size:
        expected = f"at most {found.config.vocab_size} ids, as the embedding has rows"
        found.problems.append(Problem("tokenizer", None, expected, str(len(tokenizer))))
