"""gemmakit run: a task on a text, on a file of them, or on lines as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import gemmakit
from gemmakit.cli import options as o
from gemmakit.cli import processes, records
from gemmakit.cli.answer import Answer, Shown, Write, answer, ask
from gemmakit.cli.remote import connect
from gemmakit.cli.shell import INTERRUPTED, note, show
from gemmakit.errors import InputError
from gemmakit.text.response import Thought

Say = Callable[[str, Write], Answer]
BATCH = 8  # texts that are classified together; their results do not depend on it


def run(
    prompt: Annotated[str | None, Argument(help="The text to continue; standard input if left out.")] = None,
    model: o.Model = None,
    task: Annotated[
        str, Option(metavar="TASK", help="text-generation, text-classification, token-classification.")
    ] = "text-generation",
    chat: Annotated[bool, Option("--chat", help="Ask an instruction-tuned model: the text is a user's turn.")] = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    backend: Annotated[
        str, Option(metavar="NAME", help="pytorch or flax; the latter needs gemmakit[flax].")
    ] = "pytorch",
    revision: o.Revision = None,
    tensor: o.Tensor = None,
    adapter: o.Adapter = None,
    max_new_tokens: o.MaxNewTokens = None,
    stop: o.Stop = None,
    sample: o.Sample = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    think: o.Think = None,
    draft: o.Draft = None,
    speculate: o.Speculate = None,
    aggregation: Annotated[
        str | None,
        Option(metavar="HOW", help="Tokens to entities: none, simple (if left out), first, average, max."),
    ] = None,
    json_: Annotated[bool, Option("--json", help="A JSON object a prompt, instead of the text.")] = False,
    stats: Annotated[bool, Option("--stats", help="Counts and tokens/s on stderr at the end.")] = False,
    input_: Annotated[
        Path | None, Option("--input", metavar="FILE", help="Many prompts: lines of text, .jsonl, .json or .csv.")
    ] = None,
    output: Annotated[
        Path | None, Option(metavar="FILE", help="Results as JSON lines, .json or .csv, instead of standard output.")
    ] = None,
    format_: Annotated[
        str,
        Option(
            "--format",
            metavar="KIND",
            help="Of the input: infer (from its name), text, jsonl, json, csv; or pipe: each line of standard input "
            "is a prompt, answered in a line before the next is read.",
        ),
    ] = "infer",
    column: Annotated[
        str | None, Option(metavar="NAME", help="The field of the input that is the text: prompt, or text to classify.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an --output that exists.")] = False,
    server: o.Server = None,
    api_key: o.ApiKey = None,
) -> int:
    """Continue a text, answer a question, or classify.

    The text comes as it is generated, on a terminal and in a pipe alike. Without --model, the small demo model
    that gemmakit carries is run. Ctrl-C ends the text and keeps what there is.

    Classification prints a label and its score a line; token-classification an entity a line: label, score, where
    it starts and ends, and its text.
    """
    settings = o.given(
        max_new_tokens=max_new_tokens, stop_strings=stop, do_sample=sample, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    generates = task == "text-generation"
    several = input_ is not None or format_ != "infer"
    if not generates:
        task = _classification(task, aggregation, {
            "--chat": chat, "--max-new-tokens": max_new_tokens, "--stop": stop, "--sample": sample is True,
            "--greedy": sample is False, "--temperature": temperature, "--top-k": top_k, "--top-p": top_p,
            "--min-p": min_p, "--repetition-penalty": repetition_penalty, "--seed": seed, "--stats": stats,
            "--think": think is not None, "--draft": draft, "--speculate": speculate is not None,
        })  # fmt: skip
    elif aggregation is not None:
        raise InputError("--aggregation is of --task token-classification only.")
    if think is not None and not chat:
        raise InputError("--think and --no-think are of a chat: give --chat too.")
    if tensor is not None and (server is not None or backend == "flax" or adapter is not None):
        raise InputError("--tensor splits a plain PyTorch model: --server, --backend flax and --adapter do without it.")
    if draft is not None and (tensor is not None or backend == "flax"):
        raise InputError("--draft helps a PyTorch model in one process: --tensor and --backend flax do without it.")
    if speculate is not None and backend == "flax":
        raise InputError("--speculate and --no-speculate are of a PyTorch model: --backend flax does without them.")
    if (code := processes.spread(tensor)) is not None:
        return code
    if processes.is_first(tensor):
        prompts = records.texts(prompt, input_, format_, column or ("prompt" if generates else "text"))
    else:
        prompts, output = [], None
    if output is not None:
        sink: Any = records.Sink(output, overwrite)
    else:
        sink = _Screen(not json_ and not (generates and several), several)
    if server is not None:
        local = {"--device": device != "auto", "--dtype": dtype != "auto", "--backend": backend != "pytorch"}
        local |= {"--revision": revision, "--adapter": adapter, "--task": not generates}
        local |= {"--draft": draft, "--speculate": speculate is not None}
        say = _server(server, api_key, model, local, chat, settings, think)
        with nullcontext() if output is None else sink:
            return _end(_each(say, prompts, sink), stats)
    load = gemmakit.pipeline  # loads torch, which is not counted as loading the model
    start = time.perf_counter()
    pipe = load(task, model, framework=_framework(backend), device_map=device, dtype=dtype, revision=revision,
                adapter=adapter, **o.given(assistant_model=draft), **o.split(tensor))  # fmt: skip
    loaded_s = time.perf_counter() - start
    if tensor is not None:
        prompts = processes.shared_texts(prompts, tensor)
    with nullcontext() if output is None else sink:
        if not generates:
            options = {"aggregation_strategy": aggregation or "simple"} if task == "token-classification" else {}
            _classify(pipe, prompts, sink, 1 if format_ == "pipe" else BATCH, **options)
            return 0
        settings |= o.drafts(pipe, speculate)
        say: Say = partial(answer, pipe, **settings)
        if chat:
            variables = o.template_variables(think, pipe.tokenizer.template_reads("enable_thinking"))
            settings |= o.thinking_room(think, settings, pipe.model.config.max_position_embeddings)
            say = partial(ask, pipe, variables=variables, **settings)
        return _end(_each(say, prompts, sink), stats, f"; loaded in {loaded_s:.2f} s")


def _server(
    url: str,
    key: str | None,
    model: str | None,
    local: dict[str, Any],
    chat: bool,
    settings: dict[str, Any],
    think: bool | None,
) -> Say:
    """What answers a text by asking the server."""
    server = connect(url, key, model, local)
    variables = o.template_variables(think, server.thinks)
    settings = {**settings, **o.thinking_room(think, settings, server.context)}

    def say(text: str, write: Write) -> Answer:
        said = [{"role": "user", "content": text}] if chat else text
        return server.answer(server.prompt(said, variables), write, settings)

    return say


def _end(said: Answer | None, stats: bool, more: str = "") -> int:
    """The exit code, once the last answer is told."""
    if stats and said is not None:
        note(f"{said.summary}{more}")
    return INTERRUPTED if said is not None and said.finish_reason == "interrupted" else 0


def _framework(backend: str) -> str:
    if backend not in ("pytorch", "flax"):
        raise InputError(f"--backend is {backend!r}; it must be pytorch or flax.")
    return "flax" if backend == "flax" else "pt"


def _classification(task: str, aggregation: str | None, generating: Mapping[str, Any]) -> str:
    """The task's own name. Raises InputError for one that there is not, and for options that are not its."""
    from gemmakit.pipelines import find_task

    name = find_task(task).task
    if name == "feature-extraction":
        raise InputError(f"--task {task} gives tensors, which no line of text holds: use gemmakit.pipeline in Python.")
    if aggregation is not None and name != "token-classification":
        raise InputError("--aggregation is of --task token-classification only.")
    given = [option for option, value in generating.items() if value is not None and value is not False and value != []]
    if given:
        raise InputError(f"{', '.join(given)}: of text-generation only; --task {task} has no use for it.")
    return name


def _each(say: Say, prompts: Iterable[str], sink: Any) -> Answer | None:
    """Answer the prompts one after another, until one is interrupted; the last answer."""
    said = None
    for text in prompts:
        said = say(text, sink.write)
        sink.put(text, said)
        if said.finish_reason == "interrupted":
            break
    return said


def _classify(pipe: Any, texts: Iterable[str], sink: Any, batch_size: int, **options: Any) -> None:
    """Put what `pipe` finds in each text into `sink`, in order, as soon as it is there."""
    fed, named = tee(texts)
    for text, what in zip(named, pipe(fed, batch_size=batch_size, **options), strict=False):
        sink.put(text, Found(what))


# A line is a line, whatever the text has in it.
_ESCAPED = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True)
class Found:
    """What is in a text: its label {"label", "score"}, or a list of its entities."""

    what: Any

    def record(self, text: str) -> dict[str, Any]:
        return {"text": text, **(self.what if isinstance(self.what, dict) else {"entities": self.what})}

    def lines(self) -> Iterator[str]:
        """Label and score, tab between; of an entity also where it starts and ends, and what it says."""
        if isinstance(self.what, dict):
            yield f"{self.what['label']}\t{self.what['score']:.4f}"
            return
        for e in self.what:
            name = e["entity_group"] if "entity_group" in e else e["entity"]
            yield f"{name}\t{e['score']:.4f}\t{e['start']}\t{e['end']}\t{e['word'].translate(_ESCAPED)}"


class _Screen:
    """Standard output: text as it comes, labels and entities a line each; or a JSON object a text.

    Where several texts may come, an empty line ends the entities of each, or nobody could tell whose they are.
    """

    def __init__(self, plain: bool, several: bool):
        self.plain, self.several = plain, several
        self._shown: Write | None = None

    def write(self, piece: str | Thought) -> None:
        if self.plain:
            self._shown = self._shown or Shown()
            self._shown(piece)

    def put(self, text: str, said: Any) -> None:
        if not self.plain:
            print(json.dumps(said.record(text), ensure_ascii=False), flush=True)
        elif isinstance(said, Found):
            ended = [""] if self.several and isinstance(said.what, list) else []
            show("".join(f"{line}\n" for line in (*said.lines(), *ended)))
        else:
            print(flush=True)
