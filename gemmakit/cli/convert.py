"""gemmakit convert: checkpoints of every origin in, safetensors, msgpack or GGUF out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import gemmakit
from gemmakit.cli import options as o
from gemmakit.errors import InputError
from gemmakit.hub import HubOptions, find_file, push_folder
from gemmakit.progress import progress_bar

TOKENIZER_ONLY = "tokenizer_only"
SIZES = ("2B", "7B", TOKENIZER_ONLY)


def convert(
    source: Annotated[
        str | None,
        Argument(metavar="IN", help="Folder, Hub id, or a .ckpt, .safetensors, .bin, .msgpack or .gguf file."),
    ] = None,
    target: Annotated[str | None, Argument(metavar="OUT", help="Folder to write, or a .gguf file.")] = None,
    to: Annotated[str | None, Option(metavar="KIND", help="safetensors (the default), msgpack or gguf.")] = None,
    type_: Annotated[
        str | None, Option("--type", metavar="TYPE", help="Of a GGUF file: F32, F16, BF16, Q8_0, Q5_0 or Q4_0.")
    ] = None,
    dtype: Annotated[
        str | None, Option(metavar="TYPE", help="float32, bfloat16 or float16; if left out, as stored.")
    ] = None,
    max_shard_size: Annotated[
        str, Option("--max-shard-size", "--max_shard_size", metavar="SIZE", help="Bytes a file, like 5GB or 200MB.")
    ] = "5GB",
    config: Annotated[
        str | None, Option(metavar="FILE", help="The config.json of weights that come without one.")
    ] = None,
    input_checkpoint: Annotated[
        str | None,
        Option("--input-checkpoint", "--input_checkpoint", metavar="PATH", help="IN, as the documents say it."),
    ] = None,
    output_dir: Annotated[
        str | None, Option("--output-dir", "--output_dir", metavar="PATH", help="OUT, as the documents say it.")
    ] = None,
    tokenizer_checkpoint: Annotated[
        str | None,
        Option(
            "--tokenizer-checkpoint",
            "--tokenizer_checkpoint",
            metavar="PATH",
            help="A tokenizer.model or a folder, instead of what lies beside the weights.",
        ),
    ] = None,
    model_size: Annotated[
        str | None,
        Option(
            "--model-size",
            "--model_size",
            metavar="SIZE",
            help="2B or 7B: refuse another model. tokenizer_only: write the tokenizer alone.",
        ),
    ] = None,
    convert_tokenizer: Annotated[
        bool, Option("--convert-tokenizer", "--convert_tokenizer", help="Fail if there is no tokenizer to write.")
    ] = False,
    push_to_hub: Annotated[
        bool, Option("--push-to-hub", "--push_to_hub", help="Then upload OUT, to a private repository if it is new.")
    ] = False,
    repo_id: Annotated[
        str | None, Option("--repo-id", "--repo_id", metavar="NAME", help="Where to; if left out, OUT's own name.")
    ] = None,
    keep_quantized: Annotated[
        bool, Option("--keep-quantized", help="Of a GGUF file keep Q8_0, Q5_0 or Q4_0, as int8, int5 or int4.")
    ] = False,
    allow_pickle: Annotated[
        bool, Option("--allow-pickle", help="Read a pickle that is found in a folder; it is read without running code.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a checkpoint that OUT holds.")] = False,
    revision: o.Revision = None,
) -> int:
    """Convert a checkpoint to safetensors, Flax msgpack or GGUF.

    A tensor at a time: memory for about the largest one is enough. Everything is checked before anything is written,
    and what OUT holds stays whole until the new checkpoint is.
    """
    source = _one("IN", source, "--input_checkpoint", input_checkpoint)
    target = _one("OUT", target, "--output_dir", output_dir)
    size = _size(model_size)
    if target is None:
        raise InputError("say where to write: gemmakit convert IN OUT, or --output_dir OUT.")
    if size == TOKENIZER_ONLY:
        paths = _tokenizer_only(tokenizer_checkpoint or source, target, overwrite, revision)
        print(f"{target}: {', '.join(path.name for path in paths)}")
    else:
        if source is None:
            raise InputError("say what to convert: gemmakit convert IN OUT, or --input_checkpoint IN.")
        _require_tokenizer(convert_tokenizer, tokenizer_checkpoint, source, revision)
        with progress_bar("bytes") as progress:
            paths = gemmakit.convert_checkpoint(
                source,
                target,
                to=to,
                type=type_,
                dtype=dtype,
                max_shard_size=max_shard_size,
                config=config,
                model_size=size,
                tokenizer=tokenizer_checkpoint,
                keep_quantized=keep_quantized,
                # The documented option is for Google's pickles: giving a folder there asks for the one in it.
                allow_pickle=allow_pickle or (input_checkpoint is not None and Path(input_checkpoint).is_dir()),
                overwrite=overwrite,
                progress=progress,
                revision=revision,
            )
        print(_summary(target, paths))
    if push_to_hub:
        print(_push(Path(target), repo_id))
    return 0


def _one(name: str, given: str | None, option: str, other: str | None) -> str | None:
    """The one of two spellings of the same thing."""
    if given is not None and other is not None:
        raise InputError(f"{name} is {given!r} and {option} is {other!r}: give one of them.")
    return given if other is None else other


def _size(size: str | None) -> str | None:
    found = next((known for known in SIZES if size is not None and known.lower() == size.lower()), None)
    if size is not None and found is None:
        raise InputError(f"model_size is {size!r}; it must be one of {', '.join(SIZES)}.")
    return found


def _tokenizer_only(source: str | None, target: str, overwrite: bool, revision: str | None) -> list[Path]:
    if source is None:
        raise InputError("say where the tokenizer is: --tokenizer_checkpoint PATH.")
    return gemmakit.convert_tokenizer(source, target, overwrite=overwrite, revision=revision)


def _require_tokenizer(asked: bool, named: str | None, source: str, revision: str | None) -> None:
    """--convert_tokenizer is a promise that OUT will have one; otherwise it has one where there is one."""
    if not asked or named is not None:
        return
    beside = Path(source).parent if Path(source).is_file() else source
    if not source.endswith(".gguf") and not any(
        find_file(beside, name, HubOptions(revision), optional=True) for name in ("tokenizer.model", "tokenizer.json")
    ):
        raise InputError(f"--convert_tokenizer: {beside} holds no tokenizer; name it with --tokenizer_checkpoint.")


def _summary(target: str, paths: list[Path]) -> str:
    """One line: what was written."""
    weights = [path for path in paths if path.suffix != ".json"]
    size = sum(path.stat().st_size for path in weights)
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1)) if size >= s or s == 1)
    files = f", {len(weights)} files" if len(weights) > 1 else ""
    return f"{target}: {size / scale:.{0 if scale == 1 else 1}f} {unit}{files}"


def _push(folder: Path, repo_id: str | None) -> str:
    """Upload; the commit's address. The documents' script has OUT be the repository's name."""
    if not folder.is_dir():
        raise InputError(f"{folder} is one file; put it into a folder of its own to upload it.")
    parts = folder.parts
    named = "/".join(parts) if len(parts) == 2 and not folder.is_absolute() and parts[0] not in (".", "..") else None
    return push_folder(folder, repo_id or named or folder.resolve().name, private=True)
