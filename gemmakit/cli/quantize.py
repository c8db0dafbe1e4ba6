"""gemmakit quantize: a model in, the same model in 4 to 8 bits a weight out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import gemmakit
from gemmakit.cli import options as o
from gemmakit.cli.records import decode
from gemmakit.errors import InputError
from gemmakit.progress import progress_bar

# A text for calibration is cut into pieces of this many tokens at most, and so many pieces are used, evenly spread.
PIECE, PIECES = 512, 128


def quantize(
    model: Annotated[str, Argument(metavar="IN", help="Folder or Hub id of a model with plain weights.")],
    output: Annotated[Path, Argument(metavar="OUT", help="Folder for the quantized model.")],
    int4: Annotated[bool, Option("--int4", help="4 bits a weight, a scale and a zero a group.")] = False,
    int5: Annotated[bool, Option("--int5", help="5 bits a weight, a scale a group.")] = False,
    int6: Annotated[bool, Option("--int6", help="6 bits a weight, a scale a group.")] = False,
    int8: Annotated[bool, Option("--int8", help="8 bits a weight, a scale a row.")] = False,
    bits: Annotated[
        float | None,
        Option(metavar="N", help="Bits a weight in all, 4.2 to 8.5: 4, 5, 6 or 8 by module, wherever they serve most."),
    ] = None,
    group_size: Annotated[
        int | None, Option(metavar="N", help="Weights that share a scale: 32 (if left out, up to 6 bits) or 128.")
    ] = None,
    head_bits: Annotated[
        str | None,
        Option(
            metavar="N",
            help="Of the embedding and the head: 8, 6, 5, 4, or none to keep them. By default 8, with "
            "--int5 and --int6 as the rest.",
        ),
    ] = None,
    activation_bits: Annotated[
        int, Option(metavar="N", help="To which prompts may be rounded on their way: 8, or 16 for not at all. Slower.")
    ] = 8,
    decode_activation_bits: Annotated[
        int, Option(metavar="N", help="The same of decoding by weights in 4 bits, on the CPU: 16, or 8. Faster.")
    ] = 16,
    keep: Annotated[list[str] | None, Option(metavar="NAME", help="A module to keep; may be repeated.")] = None,
    calibrate: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="A text like those the model is for: choose codes by their effect on it. Slower."),
    ] = None,
    self_calibrate: Annotated[
        bool, Option("--self-calibrate", help="The same without a text: on one that the model writes first.")
    ] = False,
    revision: o.Revision = None,
    max_shard_size: Annotated[str, Option(metavar="SIZE", help="Of each file.")] = "5GB",
    allow_pickle: Annotated[
        bool, Option("--allow-pickle", help="Read .bin files, which only their author vouches for.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is in OUT.")] = False,
) -> int:
    """Quantize a model's weights.

    Weights are read, rounded and written one at a time, so the model may be larger than memory. OUT is a model like
    any other: gemmakit run --model OUT. With --calibrate or --self-calibrate a layer at a time is held in float32.
    """
    asked = [n for n, flag in ((4, int4), (5, int5), (6, int6), (8, int8)) if flag]
    if len(asked) + (bits is not None) != 1:
        raise InputError("--int4, --int5, --int6, --int8 and --bits: give one of them.")
    if bits is not None and (group_size or head_bits) is not None:
        raise InputError("--bits decides --group-size and --head-bits for every module: leave these out.")
    if head_bits not in (None, "8", "6", "5", "4", "none"):
        raise InputError(f"--head-bits is {head_bits!r}; it must be 8, 6, 5, 4 or none.")
    each = asked[0] if asked else 4
    config = gemmakit.WeightOnlyConfig(
        bits=each,
        group_size=group_size,
        head_bits=None if head_bits == "none" else int(head_bits or (each if each in (5, 6) else 8)),
        modules_to_not_convert=keep or None,
        activation_bits=activation_bits,
        decode_activation_bits=decode_activation_bits,
    )
    if calibrate and self_calibrate:
        raise InputError("--calibrate has a text, and --self-calibrate does without: give one of them.")
    ids = "self" if self_calibrate else calibration_ids(model, calibrate, revision) if calibrate else None
    start = time.perf_counter()
    with progress_bar("parts") as tell:
        gemmakit.quantize_checkpoint(
            model,
            output,
            config,
            bits=bits,
            calibration_ids=ids,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            allow_pickle=allow_pickle,
            progress=tell and (lambda name, done, total: tell(done, total, name)),
            revision=revision,
        )
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    print(f"{output}: {size / 1e6:,.1f} MB of weights, {time.perf_counter() - start:.1f} s")
    return 0


def calibration_ids(model: str, files: list[Path], revision: str | None) -> Any:
    """The texts as ids (R, S): pieces of one length behind <bos>, evenly spread over all that is there."""
    import torch

    tokenizer = gemmakit.AutoTokenizer.from_pretrained(model, revision=revision)
    config = gemmakit.AutoConfig.from_pretrained(model, revision=revision)
    ids = [i for file in files for i in tokenizer(_text(file), add_special_tokens=False)["input_ids"]]
    step = min(PIECE, config.max_position_embeddings, len(ids) + 1) - 1
    if step < 1:
        raise InputError(f"--calibrate {files[0]} holds no text.")
    rows = torch.tensor(ids[: len(ids) // step * step]).view(-1, step)
    if len(rows) > PIECES:
        rows = rows[torch.linspace(0, len(rows) - 1, PIECES).long()]
    return torch.cat((torch.full((len(rows), 1), tokenizer.bos_token_id), rows), dim=1)


def _text(file: Path) -> str:
    try:
        return decode(file.read_bytes(), f"--calibrate {file}")
    except OSError as error:
        raise InputError(f"--calibrate {file} cannot be read: {error.strerror}.") from None
