"""gemmakit tune: a file of rows makes a model better."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from gemmakit.cli import processes
from gemmakit.cli.shell import INTERRUPTED, LOST, is_of_lost_process, note
from gemmakit.errors import GemmakitError, InputError
from gemmakit.progress import progress_bar

if TYPE_CHECKING:
    from gemmakit.tune.train import Step

_LEARNT, _PLAIN = "\x1b[32m", "\x1b[0m"


def tune(
    model: Annotated[
        str | None, Argument(help="Folder or Hub id, or demo for gemmakit's own; with --resume the folder of the run.")
    ] = None,
    data: Annotated[
        str | None, Argument(help="A file of rows (.jsonl, .json, .csv, .parquet), or a folder of train, valid, test.")
    ] = None,
    out: Annotated[str | None, Option(metavar="DIR", help="Where the result goes.")] = None,
    config: Annotated[Path | None, Option(metavar="FILE", help="tune.toml: every option as a key.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with a run from where it was last saved.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Begin anew in an --out that is not empty.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Look at everything, say what it takes, and train nothing.")
    ] = False,
    show: Annotated[int, Option(metavar="N", help="Print N rows with what is learnt of them, and train nothing.")] = 0,
    full: Annotated[bool, Option("--full", help="Train all weights, in float32 unless --dtype says bfloat16.")] = False,
    dora: Annotated[bool, Option("--dora", help="LoRA with the length of each row learnt apart.")] = False,
    qlora: Annotated[
        str | None, Option(metavar="BITS", help="LoRA on frozen weights in int4 or int8 (int4-g128 and the like).")
    ] = None,
    loss: Annotated[
        str | None, Option(metavar="KIND", help="sft (if left out), or dpo, orpo on chosen and rejected.")
    ] = None,
    beta: Annotated[float | None, Option(metavar="X", help="Of dpo and orpo; 0.1.")] = None,
    train_on: Annotated[
        str | None, Option(metavar="WHAT", help="assistant (if left out), or all: prompts too.")
    ] = None,
    chat: Annotated[
        bool, Option("--chat", help="prompt and completion are a user's turn and its answer, not a text.")
    ] = False,
    columns: Annotated[
        str | None, Option(metavar="A=B,...", help="Names in the file: prompt=question,completion=answer.")
    ] = None,
    max_length: Annotated[int | None, Option(metavar="N", help="Tokens a row; the context if left out.")] = None,
    truncate: Annotated[bool, Option("--truncate", help="Cut longer rows, which are else refused.")] = False,
    packing: Annotated[bool, Option("--packing", help="Rows of many documents, which see themselves alone.")] = False,
    rank: Annotated[int | None, Option(metavar="N", help="Of the adapter; 16.")] = None,
    alpha: Annotated[
        float | None, Option(metavar="X", help="The adapter is scaled by alpha / rank; twice the rank.")
    ] = None,
    dropout: Annotated[float | None, Option(metavar="P", help="Of what the adapter reads.")] = None,
    targets: Annotated[
        str | None, Option(metavar="A,B", help="Modules with an adapter, by the ends of their names; all projections.")
    ] = None,
    freeze: Annotated[str | None, Option(metavar="A,B", help="With --full: parameters left alone.")] = None,
    epochs: Annotated[int | None, Option(metavar="N", help="Times through the data; 1.")] = None,
    max_steps: Annotated[int | None, Option(metavar="N", help="Instead of --epochs.")] = None,
    batch_size: Annotated[int | None, Option(metavar="N", help="Rows a pass; 8.")] = None,
    accumulate: Annotated[int | None, Option(metavar="N", help="Passes a step; 1.")] = None,
    lr: Annotated[float | None, Option(metavar="X", help="Learning rate; 2e-4, with --full 1e-5.")] = None,
    schedule: Annotated[str | None, Option(metavar="KIND", help="linear (if left out), cosine, constant.")] = None,
    warmup: Annotated[
        float | None, Option(metavar="P", help="Share of the steps in which the rate rises; 0.03.")
    ] = None,
    weight_decay: Annotated[float | None, Option(metavar="X", help="Of matrices.")] = None,
    clip: Annotated[float | None, Option(metavar="X", help="Longest gradient; 1, and 0 for none.")] = None,
    neftune: Annotated[float | None, Option(metavar="X", help="Noise on the embeddings; 5 is common.")] = None,
    ema: Annotated[float | None, Option(metavar="P", help="Save an average of the weights with this decay.")] = None,
    checkpointing: Annotated[
        bool, Option("--checkpointing", help="Compute layers again on the way back: slower, far less memory.")
    ] = False,
    dtype: Annotated[str | None, Option(metavar="TYPE", help="auto (as stored), float32, bfloat16.")] = None,
    device: Annotated[str | None, Option(metavar="WHERE", help="auto, cpu, cuda:1, or a CUDA index.")] = None,
    backend: Annotated[
        str | None, Option(metavar="NAME", help="pytorch (if left out), or flax, which needs gemmakit[flax].")
    ] = None,
    attention: Annotated[str | None, Option(metavar="HOW", help="eager, sdpa, flex_attention.")] = None,
    seed: Annotated[int | None, Option(metavar="N", help="Of the adapter, the order and the noise; 0.")] = None,
    save_steps: Annotated[int | None, Option(metavar="N", help="Steps between saved states; 50.")] = None,
    eval_steps: Annotated[int | None, Option(metavar="N", help="Steps between held-out losses; 50.")] = None,
    log_steps: Annotated[int | None, Option(metavar="N", help="Steps between lines where there is no bar; 10.")] = None,
    judge_rows: Annotated[
        int | None, Option(metavar="N", help="Held-out rows that are answered before and after; 200, 0 for none.")
    ] = None,
    devices: Annotated[int, Option(metavar="N", min=1, help="Processes that share the weights and each pass.")] = 1,
    track: Annotated[
        str | None, Option(metavar="A,B", help="Send the numbers to tensorboard, trackio, wandb too.")
    ] = None,
) -> int:
    """Train an adapter (or, with --full, a model) on a file of rows.

    Rows hold messages (with tools), or prompt and completion, or text; for dpo and orpo prompt, chosen and rejected.
    Every bad row is named by its line before the first step. Ctrl-C saves and says how to go on; so does nothing that
    kills it: a run goes on from its last saved state, on a CPU to the bit.
    """
    given: dict[str, Any] = {
        "loss": loss, "beta": beta, "train_on": train_on, "max_length": max_length, "rank": rank, "alpha": alpha,
        "dropout": dropout, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size,
        "accumulate": accumulate, "lr": lr, "schedule": schedule, "warmup": warmup, "weight_decay": weight_decay,
        "clip": clip, "neftune": neftune, "ema": ema, "dtype": dtype, "device": device, "attention": attention,
        "seed": seed, "save_steps": save_steps, "eval_steps": eval_steps, "log_steps": log_steps,
        "judge_rows": judge_rows, "backend": backend, "quantization": qlora, "method": _method(full, dora, qlora),
        "columns": None if columns is None else _columns(columns),
        "targets": _names(targets), "freeze": _names(freeze), "track": _names(track),
        **{name: True for name, on in (("chat", chat), ("truncate", truncate), ("packing", packing),
                                       ("checkpointing", checkpointing)) if on},
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if not (show or dry_run) and (code := processes.spread(devices, "--devices")) is not None:
        return code
    if devices > 1 and not (show or dry_run):
        given["devices"] = devices
    from gemmakit.tune import TuneSettings
    from gemmakit.tune import resume as go_on
    from gemmakit.tune import tune as begin
    from gemmakit.tune.settings import read_toml

    if resume:
        if model is None or data is not None or out is not None or config is not None or overwrite or show or dry_run:
            raise InputError("--resume takes the folder of the run alone: gemmakit tune DIR --resume.")
        with _told(given.get("log_steps", 10)) as tell, _told_how_to_go_on(model):
            return _end(go_on(model, tell=tell, **given))
    base = {} if config is None else read_toml(config)
    places = {"model": model, "data": data, "out": out}
    if show or dry_run:
        places["out"] = out or base.get("out") or "nowhere"
    asked = {**base, **given, **{k: v for k, v in places.items() if v is not None}}
    settings = TuneSettings.from_dict(asked, "gemmakit tune" if config is None else str(config))
    if show:
        return _show(settings, show)
    if dry_run:
        from gemmakit.tune.forecast import forecast

        for line in forecast(settings):
            print(line)
        return 0
    with _told(settings.log_steps) as tell, _told_how_to_go_on(settings.out):
        return _end(begin(settings, overwrite=overwrite, tell=tell))


@contextmanager
def _told_how_to_go_on(folder: str) -> Generator[None, None, None]:
    """Where another process of the run dies, this one cannot go on, but what is saved can."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_lost_process(error):
            raise
        raise GemmakitError(
            f"{LOST}. To go on from where it was last saved, with any number of processes: "
            f"gemmakit tune {folder} --resume"
        ) from error


def _method(full: bool, dora: bool, qlora: str | None) -> str | None:
    if full and (dora or qlora):
        raise InputError(f"--full trains all weights: leave {'--dora' if dora else '--qlora'} out.")
    return "full" if full else "dora" if dora else None


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not name.strip() or not column.strip() for name, _, column in pairs):
        raise InputError(f"--columns is {text!r}; it must be like prompt=question,completion=answer.")
    return {name.strip(): column.strip() for name, _, column in pairs}


class _told:
    """Progress: a bar on a terminal, elsewhere a line every `every` steps."""

    def __init__(self, every: int):
        self.every, self.bar = every, progress_bar("items")

    def __enter__(self) -> Callable[[Step, int], None]:
        move, begun = self.bar.__enter__(), [0, 0.0]

        def tell(step: Step, total: int) -> None:
            begun[0] += step.tokens
            begun[1] += step.seconds
            loss = "skipped: the gradient is no number" if step.skipped else f"loss {step.loss:.4f}"
            rate = f"{begun[0] / max(begun[1], 1e-9):.0f} tokens/s"
            if move is not None:
                move(step.step, total, name=f"{loss}, {rate}")
            elif step.step % self.every == 0 or step.step == total or step.skipped:
                left = step.seconds * (total - step.step)
                note(f"step {step.step}/{total}: {loss}, lr {step.lr:.2g}, {rate}, {left:.0f} s left")

        return tell

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)


def _end(result: Any) -> int:
    from gemmakit.tune.report import curve, in_terminal

    if not result.finished:
        note(f"saved. To go on: gemmakit tune {result.folder} --resume")
        return INTERRUPTED
    print(f"loss {in_terminal(curve(result.records, 'loss')[1])}")
    for name, told, form in (("valid_loss", "held-out loss", ".4f"), ("accuracy", "right answers", ".1%")):
        values = curve(result.records, name)[1]
        if values:
            print(f"{told} {values[0]:{form}} before, {values[-1]:{form}} after")
    print(f"{result.folder}")
    return 0


def _show(settings: Any, count: int) -> int:
    """Rows as they are learnt: in colour on a terminal, in brackets elsewhere."""
    from gemmakit.tune.run import prepare

    made = prepare(dataclasses.replace(settings, batch_size=1))
    colour = sys.stdout.isatty()
    opened, closed = (_LEARNT, _PLAIN) if colour else ("[[", "]]")
    for example in made.examples["train"][:count]:
        for part in (example,) if hasattr(example, "ids") else (example.chosen, example.rejected):
            print(f"{part.where}: {len(part.ids)} tokens, {part.targets} learnt")
            print(_marked(made.tokenizer, part.ids, part.learnt, opened, closed))
    return 0


def _marked(tokenizer: Any, ids: Sequence[int], learnt: Sequence[bool], opened: str, closed: str) -> str:
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learnt[end] != learnt[start]:
            piece = tokenizer.decode(ids[start:end])
            text += f"{opened}{piece}{closed}" if learnt[start] else piece
            start = end
    return text
