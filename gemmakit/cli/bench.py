"""gemmakit bench: how fast a model runs here, as a share of what the machine can do, and beside other programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from gemmakit.cli import options as o
from gemmakit.cli.shell import INTERRUPTED, note
from gemmakit.errors import InputError, MissingDependency

PEERS = ("transformers", "llama.cpp")


def bench(
    model: Annotated[str | None, Argument(help="Folder or Hub id; if left out, the demo model.")] = None,
    device: Annotated[
        str, Option(metavar="WHERE", help="cpu or cuda. cuda without a model runs the whole recipe: 2B, then 7B.")
    ] = "cpu",
    dtype: o.Dtype = "auto",
    quantize: Annotated[str | None, Option(metavar="HOW", help="int8, int4 or int4-g128, while loading.")] = None,
    size: Annotated[
        str | None, Option(metavar="SIZE", help="Random weights in the shape 2b, 7b or tiny, instead of a model.")
    ] = None,
    prompt: Annotated[int, Option(metavar="N", help="Tokens of the prompt.")] = 64,
    new: Annotated[int, Option(metavar="N", help="Tokens to generate in each timed run.")] = 16,
    context: Annotated[
        str, Option(metavar="N,N", help="Tokens in the cache before decoding is timed; 0 is right after the prompt.")
    ] = "0",
    threads: Annotated[
        int | None, Option(metavar="N", help="CPU threads of every side; all cores if left out.")
    ] = None,
    rounds: Annotated[int, Option(metavar="N", help="Processes a side; the sides take turns.")] = 3,
    repeats: Annotated[int, Option(metavar="N", help="Timed runs in each process.")] = 3,
    peer: Annotated[
        list[str] | None, Option(metavar="NAME", help="Measure beside: transformers, llama.cpp; may be repeated.")
    ] = None,
    llama_python: Annotated[
        str | None, Option(metavar="PATH", help="Interpreter that has llama-cpp-python; this one if left out.")
    ] = None,
    gguf: Annotated[list[Path] | None, Option(metavar="FILE", help="A file for llama.cpp; may be repeated.")] = None,
    recipe: Annotated[bool, Option("--recipe", help="The recipe of --device cuda, on any device and size.")] = False,
    budget: Annotated[float, Option(metavar="SECONDS", help="Time the recipe may take.")] = 570.0,
    json_: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write everything measured there, after each part.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="A glance, to try it out: the numbers are rough.")] = False,
) -> int:
    """Measure a model: load, first token, prefill, decoding, memory.

    The machine's read bandwidth and matmul rate are measured in the same run, and the table says which share of them
    was reached. Peers do the same work in turn, each in a fresh process. Ctrl-C keeps what there is.
    """
    if json_ is not None and not json_.absolute().parent.is_dir():
        raise InputError(f"--json {json_}: there is no folder {json_.absolute().parent}.")
    if model is not None and size is not None:
        raise InputError(f"{model!r} and --size {size} are both given: give one of them.")
    peers = _peers(peer or [], gguf or [], device)
    threads = _threads(threads)
    if recipe or (_is_accelerator(device) and model is None and size is None):
        _refuse_for_recipe(model, quantize, gguf)
        return _recipe(device, dtype, size, threads, budget, json_, quick)

    from gemmakit.bench.compare import Comparison, llamacpp_side, transformers_side

    source, name = _source(model, size, dtype)
    comparison = Comparison(
        model=source, name=name, random=size is not None, device=device, dtype=dtype, quantize=_scheme(quantize),
        prompt=prompt, new=new, contexts=_contexts(context), threads=threads, rounds=rounds, repeats=repeats,
        save=json_, say=_say(), more={"limit_s": 0.05, "limit_bytes": 1 << 22, "tokens": 512} if quick else None,
    )  # fmt: skip
    sides: list[Any] = []
    if "transformers" in peers:
        sides.append(transformers_side(comparison.spec, dtype))
    if "llama.cpp" in peers:
        sides += [llamacpp_side(comparison.spec, file, llama_python or sys.executable) for file in gguf or []]
    comparison.peers = sides
    return _finish(comparison.run(), recipe=False)


def _recipe(
    device: str, dtype: str, size: str | None, threads: int, budget: float, save: Path | None, quick: bool
) -> int:
    from gemmakit.bench.models import size_config
    from gemmakit.bench.recipe import SMALL, Recipe, Scale

    sizes = (size,) if size else ("2b", "7b")
    for each in sizes:
        size_config(each)
    recipe = Recipe(
        sizes=sizes, device=device, dtype="bfloat16" if dtype == "auto" else dtype, threads=threads, budget_s=budget,
        save=save, say=_say(), scale=SMALL if quick else Scale(),
    )  # fmt: skip
    return _finish(recipe.run(), recipe=True)


def _finish(result: dict[str, Any], recipe: bool) -> int:
    """Print the table; the exit code."""
    from gemmakit.bench.report import comparison_table, plain_lines, recipe_table

    table = recipe_table(result) if recipe else comparison_table(result)
    _clear()
    if sys.stdout.isatty():
        _rich(table)
    else:
        print("\n".join(plain_lines(table)))
    if result["interrupted"]:
        return INTERRUPTED
    if recipe:
        return int(all("error" in part for part in result["parts"].values()))
    return int(result["ours"] not in result["sides"])


def _rich(table: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console, drawn = Console(highlight=False), Table(title=table.title, box=SIMPLE_HEAD, title_justify="left")
    for i, heading in enumerate(table.headings):
        drawn.add_column(heading, justify="right" if i else "left")
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)
    for line in table.notes:
        console.print(line, markup=False)


def _say() -> Any:
    """Progress: one line that is written over on a terminal, else nothing but the beginning of each part."""

    def say(message: str) -> None:
        if _on_terminal():
            print(f"\r\x1b[Kgemmakit: {message}", end="", file=sys.stderr, flush=True)
        else:
            note(message)

    return say


def _clear() -> None:
    if _on_terminal():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


# -- what was asked for ------------------------------------------------------------------------------------------------


def _peers(names: list[str], files: list[Path], device: str) -> list[str]:
    """The peers to measure. Raises InputError and MissingDependency, before anything is measured."""
    from importlib.util import find_spec

    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise InputError(f"--peer is {unknown[0]!r}; it must be {' or '.join(PEERS)}.")
    if "transformers" in names and find_spec("transformers") is None:
        raise MissingDependency("--peer transformers needs the transformers package: pip install transformers.")
    if "llama.cpp" in names and not files:
        raise InputError("--peer llama.cpp needs a model of its own: name one with --gguf FILE.")
    if "llama.cpp" in names and _is_accelerator(device):
        raise InputError(f"--peer llama.cpp is measured on the CPU only; --device is {device}.")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(f"--gguf {missing[0]}: there is no such file.")
    return [*names, *(["llama.cpp"] if files and "llama.cpp" not in names else [])]


def _refuse_for_recipe(model: str | None, quantize: str | None, gguf: list[Path] | None) -> None:
    given = {"a model": model, "--quantize": quantize, "--gguf": gguf}
    for name, value in given.items():
        if value:
            raise InputError(f"the recipe measures random weights in every format: it takes no {name.split()[-1]}.")


def _threads(threads: int | None) -> int:
    from gemmakit.bench.facts import available_cores

    return available_cores() if threads is None else threads


def _is_accelerator(device: str) -> bool:
    if device == "cpu":
        return False
    if device.partition(":")[0] != "cuda":
        raise InputError(f"--device is {device!r}; it must be cpu, cuda or cuda:N.")
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"--device {device}: this torch sees no CUDA device. See gemmakit doctor.")
    return True


def _scheme(name: str | None) -> str | None:
    from gemmakit.bench.models import scheme_config

    scheme_config(name)
    return name


def _contexts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--context is {text!r}; give token counts with commas, as in 0,4096.") from None


def _source(model: str | None, size: str | None, dtype: str) -> tuple[str, str]:
    """(folder or Hub id, what to call it)."""
    if size is not None:
        from gemmakit.bench.models import cached_random, size_config

        size_config(size)  # refuses one that there is not before anything is said of it
        folder = cached_random(size, "bfloat16" if dtype == "auto" else dtype, say=note)
        return str(folder), f"Gemma {size.upper()} shape"
    if model is not None:
        return model, model
    from gemmakit.hub import demo_model

    return str(demo_model()), "the demo model"
