"""gemmakit chat: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from typer import Option

import gemmakit
from gemmakit.cli import options as o
from gemmakit.cli.answer import Shown
from gemmakit.cli.conversation import Conversation
from gemmakit.cli.records import decode
from gemmakit.cli.remote import ServerConversation, connect
from gemmakit.cli.shell import note
from gemmakit.errors import GemmakitError

COMMANDS = """\
/reset        forget what was said
/system TEXT  instructions for the model; without TEXT, none
/save FILE    write the conversation as JSON
/help         this list
/quit         leave; so does Ctrl-D

Ctrl-C stops an answer and keeps what was said of it. A line that ends in \\ goes on in the next.
"""


def chat(
    model: o.Model = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    adapter: o.Adapter = None,
    system: Annotated[str | None, Option(metavar="TEXT", help="Instructions for the model.")] = None,
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
    stats: Annotated[bool, Option("--stats", help="Counts and tokens/s on stderr after each answer.")] = False,
    server: o.Server = None,
    api_key: o.ApiKey = None,
) -> int:
    """Talk with a model.

    Answers come as they are generated. /help lists what can be typed besides messages; Ctrl-C stops an answer,
    Ctrl-D leaves. Messages can be piped in, one a line.
    """
    settings = o.given(
        max_new_tokens=max_new_tokens, stop_strings=stop, do_sample=sample, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    talk: Conversation
    if server is None:
        pipe = gemmakit.pipeline("text-generation", model, device_map=device, dtype=dtype, revision=revision,
                                 adapter=adapter, **o.given(assistant_model=draft))  # fmt: skip
        variables = o.template_variables(think, pipe.tokenizer.template_reads("enable_thinking"))
        settings |= o.thinking_room(think, settings, pipe.model.config.max_position_embeddings)
        settings |= o.drafts(pipe, speculate)
        talk = Conversation(pipe, settings, system, variables=variables)
    else:
        local = {"--device": device != "auto", "--dtype": dtype != "auto", "--revision": revision, "--adapter": adapter}
        local |= {"--draft": draft, "--speculate": speculate is not None}
        there = connect(server, api_key, model, local)
        variables = o.template_variables(think, there.thinks)
        settings |= o.thinking_room(think, settings, there.context)
        talk = ServerConversation(None, settings, system, variables=variables, server=there)
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if at_terminal:
        print(f"{_title(talk.name)}, context of {talk.context} tokens. /help lists commands.\n")
    for line in _typed() if at_terminal else _piped():
        if line.startswith("/"):
            if not _obey(talk, line):
                break
        elif line.strip():
            _answer(talk, line, stats)
    return 0


def _title(name: str) -> str:
    folder = Path(name)
    return "gemmakit's demo model" if folder.name == "demo" and folder.parent.name == "gemmakit" else name


def _typed() -> Iterator[str]:
    """Lines from a person, with history and editing where the system has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]  (input() uses it once it is imported)
    while True:
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{input('. ')}"
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        except EOFError:
            print()
            return
        yield line


def _piped() -> Iterator[str]:
    if sys.stdin is None:
        return
    held = ""
    for data in sys.stdin.buffer:
        line = held + decode(data, "standard input").rstrip("\r\n")
        if line.endswith("\\"):
            held = f"{line[:-1]}\n"
            continue
        held = ""
        yield line


def _answer(talk: Conversation, question: str, stats: bool) -> None:
    forgotten = talk.forgotten
    try:
        said = talk.ask(question, Shown())
    except GemmakitError as error:
        note(str(error))
        return
    print("\n", flush=True)
    if talk.forgotten > forgotten:
        note(
            f"the conversation outgrew the context: the model no longer sees its first {talk.forgotten // 2} questions "
            "and answers. /reset starts anew."
        )
    if not said.text.strip():
        note("no answer, so the question is forgotten too.")
    if said.finish_reason == "length":
        note(f"the answer was cut off after {said.new_tokens} tokens (--max-new-tokens, or the end of the context).")
    if stats:
        note(said.summary)


def _obey(talk: Conversation, line: str) -> bool:
    """Do what a /command says; whether the conversation goes on."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command in ("/quit", "/exit", "/bye"):
        return False
    if command == "/reset":
        talk.reset()
        note("forgotten. A new conversation.")
    elif command == "/system":
        talk.system = rest or None
        note("instructions taken." if rest else "no instructions any more.")
    elif command == "/save":
        _save(talk, rest)
    else:
        if command != "/help":
            note(f"there is no command {command}.")
        print(COMMANDS, flush=True)
    return True


def _save(talk: Conversation, name: str) -> None:
    if not name:
        note("name a file: /save FILE.")
        return
    path = Path(name).expanduser()
    content = {"model": talk.name, "messages": talk.transcript()}
    try:
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        note(f"cannot write {path}: {error.strerror}.")
        return
    note(f"saved {len(talk.messages)} messages to {path}.")
