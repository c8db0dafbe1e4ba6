"""gemmakit bench: how fast a model runs here, as a share of what the machine can do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

from typer import Argument, Option

from gemmakit.bench.timing import Work, decode_key
from gemmakit.cli import options as o
from gemmakit.cli import processes
from gemmakit.cli.env import about, available_cores
from gemmakit.cli.shell import INTERRUPTED, note
from gemmakit.errors import InputError
from gemmakit.files import write_text
from gemmakit.hub import demo_model

QUICK: dict[str, Any] = {"limit_s": 0.05, "limit_bytes": 1 << 22}
QUICK_TOKENS = 512  # of the text that quality is measured on
NOTHING = "-"
PEERS = ("openvino", "onnxruntime", "llama.cpp", "transformers")  # of benchmarks/compare.py


def bench(
    model: Annotated[str | None, Argument(help="Folder or Hub id; if left out, the demo model.")] = None,
    device: Annotated[str, Option(metavar="WHERE", help="cpu or cuda.")] = "cpu",
    dtype: o.Dtype = "auto",
    quantize: Annotated[
        str | None, Option(metavar="HOW", help="int8, int6, int5, int4, int4-g128, int4-a8, while loading.")
    ] = None,
    size: Annotated[
        str | None,
        Option(
            metavar="SIZE",
            help="Random weights in the shape of a released size (2b, gemma2-9b, gemma3-4b, ...) or tiny.",
        ),
    ] = None,
    prompt: Annotated[int, Option(metavar="N", help="Tokens of the prompt.")] = 64,
    new: Annotated[int, Option(metavar="N", help="Tokens to generate in each timed run.")] = 16,
    context: Annotated[
        str, Option(metavar="N,N", help="Tokens in the cache before decoding is timed; 0 is right after the prompt.")
    ] = "0",
    threads: Annotated[
        int | None, Option(metavar="N", help="CPU threads; all cores if left out, shared by --tensor's processes.")
    ] = None,
    tensor: o.Tensor = None,
    repeats: Annotated[int, Option(metavar="N", help="Timed runs, of which the median counts.")] = 3,
    json_: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write everything measured there, after each part.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="A glance, to try it out: the numbers are rough.")] = False,
    peer: Annotated[
        list[str] | None,
        Option(
            metavar="PROGRAM",
            help="openvino, onnxruntime, llama.cpp or transformers, in turn; may be repeated. Needs a checkout.",
        ),
    ] = None,
) -> int:
    """Measure a model: load, first token, prefill, decoding, memory.

    The machine's read bandwidth and matmul rate are measured in the same run, and the table says which share of them
    was reached; of --quantize also what it costs in quality. Ctrl-C keeps what there is.
    """
    if json_ is not None and not json_.absolute().parent.is_dir():
        raise InputError(f"--json {json_}: there is no folder {json_.absolute().parent}.")
    if model is not None and size is not None:
        raise InputError(f"{model!r} and --size {size} are both given: give one of them.")
    if threads is not None and threads < 1:
        raise InputError(f"--threads is {threads}; it must be at least 1.")
    on_cpu = device == "cpu"
    work = Work(
        prompt=prompt, new=new, contexts=_contexts(context), repeats=repeats,
        fill="random" if on_cpu else "prompt", stream=on_cpu,
    )  # fmt: skip
    if peer:
        if tensor is not None:
            raise InputError("--peer measures one process a program: leave --tensor out.")
        given = {"size": size, "device": device, "dtype": dtype, "quantize": quantize, "prompt": prompt, "new": new,
                 "context": context, "threads": threads, "repeats": repeats, "json": json_,
                 "rounds": 1 if quick else None}  # fmt: skip
        _beside(peer, model, given, quick)
    if (code := processes.spread(tensor)) is not None:
        return code
    threads = threads or max(1, available_cores() // (tensor or 1))
    asked: dict[str, Any] = {"dtype": dtype, "device": device, "threads": threads, "quantize": quantize}
    asked |= o.split(tensor)
    if not processes.is_first(tensor):
        from gemmakit.bench import measure

        measure.speed(_source(model, size), work, **asked)
        return 0
    result = _measured(model, size, work, asked, json_, quick)
    print("\n".join(report(result)))
    return INTERRUPTED if result["interrupted"] else 0


def _beside(peers: list[str], model: str | None, given: dict[str, Any], quick: bool) -> NoReturn:
    """Hand over to benchmarks/compare.py, which is not in the package: other programs are the laboratory's.

    Raises InputError for a program that there is not, and where this is no checkout.
    """
    if unknown := [peer for peer in peers if peer not in PEERS]:
        raise InputError(f"--peer is {unknown[0]!r}; it must be one of {', '.join(PEERS)}.")
    root = Path(__file__).resolve().parents[2]
    script = root / "benchmarks" / "compare.py"
    if not script.is_file():
        names = " ".join(peers)
        raise InputError(
            f"--peer {names}: other programs are measured from a checkout of gemmakit's repository, which {root} is "
            f'not. Clone it, run `make peers PEERS="{names}"` in it, and then its own `.venv/bin/gemmakit bench`.'
        )
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += [f"--peer={peer}" for peer in peers] + ["--quick"] * quick
    command = [sys.executable, str(script), *options, *([] if model is None else [model])]
    os.execv(sys.executable, command)  # in this process's place, so that Ctrl-C is its own


def _contexts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--context is {text!r}; give token counts with commas, as in 0,4096.") from None


def _measured(
    model: str | None, size: str | None, work: Work, asked: dict[str, Any], save: Path | None, quick: bool
) -> dict[str, Any]:
    """What the JSON holds. Ctrl-C gives what there is, `interrupted` true."""
    from gemmakit.bench import measure

    _require(asked["device"])
    measure.scheme_config(asked["quantize"])
    source = _source(model, size)
    result: dict[str, Any] = {
        "what": "load, first token, prefill and greedy decoding of one prompt, choosing tokens included",
        **about(asked["threads"]),
        "model": {"name": model or (f"Gemma {size.upper()} shape" if size else "the demo model"),
                  "random_weights": size is not None},
        "settings": {**vars(work), **asked},
        "speed": {}, "limits": {}, "shares": {}, "quality": None, "interrupted": False,
    }  # fmt: skip

    def keep() -> None:
        result["shares"] = measure.shares(result["speed"] or None, result["limits"])
        if save is not None:
            write_text(save, json.dumps(result, indent=1) + "\n")

    try:
        note(f"measuring {result['model']['name']}")
        result["speed"] = measure.speed(source, work, **asked)
        keep()
        note("measuring the machine's limits")
        result["limits"] = measure.limits(asked["device"], asked["threads"], **(QUICK if quick else {}))
        keep()
        if asked["quantize"] is not None:
            note(f"measuring the quality of {asked['quantize']}, on the demo model")
            result["quality"] = _quality(asked, quick)
    except KeyboardInterrupt:
        result["interrupted"] = True
    keep()
    return result


def _source(model: str | None, size: str | None) -> Any:
    """What `measure.speed` takes."""
    from gemmakit.bench import measure

    return (model or str(demo_model())) if size is None else measure.size_config(size)


def _quality(asked: dict[str, Any], quick: bool) -> dict[str, Any]:
    """What went wrong where it cannot be measured, so that the speed is not quoted alone."""
    from gemmakit.bench import measure

    tokens = {"tokens": QUICK_TOKENS} if quick else {}
    try:
        return measure.quality(asked["quantize"], asked["threads"], device=asked["device"], **tokens)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _require(device: str) -> None:
    if device == "cpu":
        return
    if device.partition(":")[0] != "cuda":
        raise InputError(f"--device is {device!r}; it must be cpu, cuda or cuda:N.")
    from gemmakit.pytorch.placement import parse_device

    parse_device(device, "--device")


# -- the table ---------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> list[str]:
    model, settings = result["model"], result["settings"]
    random = ", random weights" if model["random_weights"] else ""
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    title = f"{model['name']}{random}: prompt {settings['prompt']}, new {settings['new']}, {threads}"
    return [title, *aligned([["", "measured", "of the limit"], *_rows(result)]), *_notes(result)]


def aligned(rows: list[list[str]]) -> Iterator[str]:
    """Columns as wide as they must be, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def _rows(result: dict[str, Any]) -> Iterator[list[str]]:
    speed, shares, settings = result["speed"], result["shares"], result["settings"]

    def row(name: str, key: str, unit: str, share: float | None = None, of: str = "") -> list[str]:
        value = f"{speed[key]:.3g} {unit}" if key in speed else NOTHING
        return [name, value, NOTHING if share is None else f"{share:.0%} {of}"]

    yield row("load", "load_s", "s")
    yield row("start to first token", "first_token_s", "s")
    of_matmul = shares.get("prefill_of_matmul")
    yield row(f"prefill, {settings['prompt']} tokens", "prefill_tokens_per_s", "tok/s", of_matmul, "matmul")
    for context in settings["contexts"]:
        name = "decode" if context == 0 else f"decode after {context:,} tokens"
        share = shares.get("decode_of_bandwidth", {}).get(str(context))
        yield row(name, decode_key(context), "tok/s", share, "bandwidth")
    yield row("memory, anonymous", "anonymous_gb", "GB")
    yield row("memory, peak", "peak_rss_gb", "GB")
    if "peak_device_gb" in speed:
        yield row("memory of the device, peak", "peak_device_gb", "GB")


def _notes(result: dict[str, Any]) -> Iterator[str]:
    if result["speed"]:
        yield bytes_note(result["speed"])
    yield from limit_notes(result["limits"], result["shares"])
    scheme = result["settings"]["quantize"]
    if scheme is not None:
        yield quality_note(scheme, result["quality"])
    if result["settings"].get("tp_plan") is not None:
        yield "Bytes, memory and limits are those of one process; the tokens are of all of them together."
    if result["interrupted"]:
        yield "Interrupted: this is what was measured until then."


def bytes_note(speed: dict[str, Any]) -> str:
    read = ", ".join(f"{b / 1e9:.3g} GB after {c}" for c, b in speed["bytes_a_token"].items())
    return f"Bytes a token: {read}; the head, in {speed['head_dtype']}, is {speed['head_bytes'] / 1e9:.3g} GB of them."


def limit_notes(limits: dict[str, Any], shares: dict[str, Any]) -> Iterator[str]:
    if not limits:
        return
    rates = ", ".join(f"{rate / 1e3:.3g} in {dtype}" for dtype, rate in limits["matmul_gflop_per_s"].items())
    said = f" (shares are of {shares['matmul_dtype']})" if "matmul_dtype" in shares else ""
    yield (
        f"Limits in this run: {limits['bandwidth_gb_per_s']:.4g} GB/s read ({limits['bandwidth_by']}); "
        f"matmul {rates} TFLOP/s{said}."
    )
    if any(share > 1 for share in shares.get("decode_of_bandwidth", {}).values()):
        yield "A share above 100 % cannot be: the machine was busier while its limits were measured. Measure again."


def quality_note(scheme: str, quality: dict[str, Any] | None) -> str:
    """A quantized speed without its quality says nothing."""
    if not quality or "error" in quality:
        why = f" ({quality['error']})" if quality else ""
        return f"No quality of {scheme} was measured{why}: without it these speeds say nothing."
    return (
        f"Quality of {scheme}, demo model: perplexity {quality['perplexity_ratio']:.4f}x, likeliest token the same "
        f"{quality['top1_agreement']:.1%}, KL {quality['kl_nats']:.2g} nats."
    )
