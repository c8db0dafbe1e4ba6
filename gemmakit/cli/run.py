"""gemmakit run: continue a prompt, or a file of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from gemmakit.cli import options as o
from gemmakit.cli.prompts import given, read_prompt
from gemmakit.cli.shell import INTERRUPTED, note, show
from gemmakit.errors import InputError


def run(
    prompt: Annotated[str | None, Argument(help="The text to continue; standard input if left out.")] = None,
    model: o.Model = None,
    task: Annotated[str, Option(metavar="TASK", help="What to do with the text.")] = "text-generation",
    chat: Annotated[bool, Option("--chat", help="Ask an instruction-tuned model: the text is a user's turn.")] = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    backend: Annotated[
        str, Option(metavar="NAME", help="pytorch or flax; the latter needs gemmakit[flax].")
    ] = "pytorch",
    revision: o.Revision = None,
    max_new_tokens: o.MaxNewTokens = None,
    stop: o.Stop = None,
    sample: o.Sample = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    json_: Annotated[bool, Option("--json", help="A JSON object a prompt, instead of the text.")] = False,
    stats: Annotated[bool, Option("--stats", help="Counts and tokens/s on stderr at the end.")] = False,
    input_: Annotated[
        Path | None, Option("--input", metavar="FILE", help="Many prompts: lines of text, .jsonl, .json or .csv.")
    ] = None,
    output: Annotated[
        Path | None, Option(metavar="FILE", help="Results as JSON lines, .json or .csv, instead of standard output.")
    ] = None,
    format_: Annotated[
        str, Option("--format", metavar="KIND", help="Of --input: infer (from its name), text, jsonl, json, csv.")
    ] = "infer",
    column: Annotated[str, Option(metavar="NAME", help="The field of --input that is the prompt.")] = "prompt",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an --output that exists.")] = False,
) -> int:
    """Continue a text or answer a question.

    The text comes as it is generated, on a terminal and in a pipe alike. Without --model, the small demo model
    that gemmakit carries is run. Ctrl-C ends the text and keeps what there is.
    """
    from gemmakit.cli import records

    settings = given(
        max_new_tokens=max_new_tokens, stop_strings=stop, do_sample=sample, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    if input_ is None and output is None:
        prompts, sink = [read_prompt(prompt)], _Screen(plain=not json_)
    else:
        prompts = [read_prompt(prompt)] if input_ is None else records.read(input_, format_, column)
        sink = _Screen(plain=False) if output is None else records.Sink(output, overwrite)

    from gemmakit.pipelines import pipeline

    start = time.perf_counter()
    pipe = pipeline(task, model, framework=_framework(backend), device_map=device, dtype=dtype, revision=revision)
    loaded_s = time.perf_counter() - start
    with sink:
        said = _each(pipe, prompts, chat, settings, sink)
    if stats and said is not None:
        note(f"{said.summary}; loaded in {loaded_s:.2f} s")
    return INTERRUPTED if said is not None and said.finish_reason == "interrupted" else 0


def _framework(backend: str) -> str:
    if backend not in ("pytorch", "flax"):
        raise InputError(f"--backend is {backend!r}; it must be pytorch or flax.")
    return "flax" if backend == "flax" else "pt"


def _each(pipe: Any, prompts: list[str], chat: bool, settings: dict[str, Any], sink: Any) -> Any:
    """Answer the prompts one after another, until one is interrupted; the last answer."""
    from gemmakit.cli.answer import answer, ask

    said = None
    for text in prompts:
        said = (ask if chat else answer)(pipe, text, sink.write, **settings)
        sink.put(text, said)
        if said.finish_reason == "interrupted":
            break
    return said


class _Screen:
    """Standard output: the text as it comes, or a JSON object once it is whole."""

    def __init__(self, plain: bool):
        self.plain = plain

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, text: str) -> None:
        if self.plain:
            show(text)

    def put(self, prompt: str, said: Any) -> None:
        print("" if self.plain else json.dumps(said.record(prompt), ensure_ascii=False), flush=True)
