"""The options that several verbs share, and the settings that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from gemmakit.errors import InputError

if TYPE_CHECKING:
    from gemmakit.pipelines import TextGenerationPipeline

Model = Annotated[
    str | None, Option("--model", "-m", metavar="NAME", help="Folder or Hub id; if left out, the demo model.")
]
Device = Annotated[
    str, Option(metavar="WHERE", help="auto (an accelerator if there is one), cpu, cuda:1, or a CUDA index.")
]
Dtype = Annotated[str, Option(metavar="TYPE", help="auto (as stored), float32, bfloat16, float16.")]
Adapter = Annotated[
    Path | None, Option("--adapter", metavar="DIR", help="An adapter for the model: of gemmakit tune, or peft.")
]
Tensor = Annotated[
    int | None, Option(metavar="N", min=1, help="Split the model over N processes, each with a part of every layer.")
]
Draft = Annotated[
    str | None,
    Option(
        "--draft", metavar="NAME", help="A smaller model with the same vocabulary that proposes tokens, to be quicker."
    ),
]
Speculate = Annotated[
    bool | None,
    Option(
        "--speculate/--no-speculate",
        help="Check tokens that a text proposes to itself, several a step; if left out, where no bit changes.",
    ),
]
Revision = Annotated[str | None, Option(metavar="NAME", help="Branch, tag or commit on the Hub.")]

MaxNewTokens = Annotated[
    int | None,
    Option(
        "--max-new-tokens",
        "-n",
        metavar="N",
        help="At most N; if left out, 256 (2048 with --think) or what the context holds.",
    ),
]
Stop = Annotated[list[str] | None, Option(metavar="TEXT", help="End after this text; may be repeated.")]
Sample = Annotated[
    bool | None,
    Option("--sample/--greedy", "--do-sample", help="Draw tokens, or take the likeliest; else the model's own way."),
]
Temperature = Annotated[float | None, Option(metavar="X", help="Divide the logits by X, and sample.")]
TopK = Annotated[int | None, Option(metavar="N", help="Sample from the N likeliest tokens.")]
TopP = Annotated[float | None, Option(metavar="P", help="Sample from the smallest set of probability P.")]
MinP = Annotated[
    float | None, Option(metavar="P", help="Sample from what is at least P times as likely as the likeliest.")
]
RepetitionPenalty = Annotated[float | None, Option(metavar="X", help="Above 1 discourages repetition.")]
Think = Annotated[
    bool | None,
    Option("--think/--no-think", help="Let a model think first that can; else its template's own way."),
]
Seed = Annotated[int | None, Option(metavar="N", help="Sample, the same way every time.")]

Server = Annotated[
    str | None, Option("--server", metavar="URL", help="Ask a running gemmakit serve instead of loading a model here.")
]
KEY_VARIABLE = "GEMMAKIT_API_KEY"
ApiKey = Annotated[str | None, Option(metavar="KEY", help=f"For --server; or in {KEY_VARIABLE}.")]

DEFAULT_NEW_TOKENS = 256  # what --max-new-tokens promises
THINKING_NEW_TOKENS = 2048  # the same for an answer with thoughts, where the context holds four times as many

# A person who sets one of these wants the answer drawn, not the likeliest.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


def template_variables(think: bool | None, can: bool) -> dict[str, Any]:
    """What the chat template is told beside the messages. can: whether it lets its model think."""
    if think and not can:
        raise InputError("--think: this model's chat template knows no thinking; leave it out.")
    return {} if think is None else {"enable_thinking": think}


def thinking_room(think: bool | None, settings: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The setting that gives thoughts room, unless the person has said how much there is."""
    if not think or "max_new_tokens" in settings or not context:
        return {}
    return {"max_new_tokens": max(1, min(THINKING_NEW_TOKENS, context // 4))}


def split(tensor: int | None) -> dict[str, Any]:
    """What --tensor says to from_pretrained."""
    return {} if tensor is None else {"tp_plan": "auto"}


def drafts(pipe: TextGenerationPipeline, speculate: bool | None) -> dict[str, Any]:
    """The settings of --draft, whose model the pipeline has loaded, and of --speculate."""
    draft = pipe.options.get("assistant_model")
    return given(assistant_model=draft, speculate=speculate)


def given(**options: Any) -> dict[str, Any]:
    """The settings that were set. Any of `SAMPLING` turns sampling on unless do_sample says otherwise."""
    settings = {name: value for name, value in options.items() if value is not None and value != []}
    if "do_sample" not in settings and any(name in settings for name in SAMPLING):
        settings["do_sample"] = True
    return settings
