"""From settings to a result: what is looked at before the first step, the steps, and what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gemmakit
from gemmakit.auto import AutoModelForCausalLM, AutoTokenizer
from gemmakit.errors import CheckpointError, InputError, MissingDependency
from gemmakit.files import read_json_object, replacing, sampled_digest, write_text
from gemmakit.hub import demo_model
from gemmakit.pytorch.adapters import (
    ALL_LINEAR,
    LoraConfig,
    add_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from gemmakit.pytorch.attention import SEGMENTED
from gemmakit.pytorch.placement import parse_device
from gemmakit.tune import devices, memory, report, state
from gemmakit.tune.data import Source, find_splits, read
from gemmakit.tune.examples import Encoder, Example, Pair, Question
from gemmakit.tune.judge import accuracy
from gemmakit.tune.objectives import NextTokens, Objective, Preferences, reference_logprobs
from gemmakit.tune.settings import FREE, TuneSettings
from gemmakit.tune.trackers import Trackers, check_trackers
from gemmakit.tune.train import Step, Trainer, mean_loss

SETTINGS = "tune.json"
# What a run leaves in its folder, for the next one there to take away: an adapter beside a model would be run with it.
LEFT = (
    *state.LEFT, report.METRICS, report.CARD, report.PLOT, "adapter_config.json", "adapter_model.safetensors",
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "tensorboard/events.out.tfevents.*", SETTINGS,
)  # fmt: skip

Tell = Callable[[Step, int], None]


@dataclass(frozen=True)
class Result:
    """finished: False where Ctrl-C ended it; it goes on with `resume`. records: of metrics.jsonl."""

    folder: Path
    finished: bool
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """What a run is made of, once all that can be wrong with it was looked at."""

    settings: TuneSettings
    model: Any
    tokenizer: Any
    adapter: LoraConfig | None
    examples: dict[str, list[Any]]
    questions: list[Question]
    objective: Objective
    valid: Objective | None
    kept: dict[str, Any]  # what tune.json holds


def prepare(settings: TuneSettings) -> Prepared:
    """Read the data, load the model, and encode every row.

    Raises InputError and what loading raises; nothing is written.
    """
    check_trackers(settings.track)
    devices.meet(settings.devices, parse_device(settings.device))
    sources = {split: read(path, settings.columns) for split, path in find_splits(settings.data).items()}
    source = demo_model() if settings.model == "demo" else settings.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    model, adapter = _model(settings, source)
    encoder = _encoder(settings, tokenizer, model)
    _check_chat(settings, sources["train"])
    examples = {split: _encoded(settings, encoder, source.rows) for split, source in sources.items()}
    held_out = next((s for s in ("test", "valid") if s in sources), None)
    questions = [] if held_out is None or settings.loss != "sft" else _questions(encoder, sources[held_out], settings)
    _check_amount(settings, len(examples["train"]))
    objectives = {
        split: _objective(settings, model, tokenizer, made, encoder.limit) for split, made in examples.items()
    }
    if settings.backend == "pytorch":
        memory.require_pass(model, objectives["train"], settings)
    kept = {
        "settings": settings.to_dict(),
        "data": {split: {"digest": s.digest, "rows": len(s.rows)} for split, s in sources.items()},
        "model": _digest(Path(source)) if Path(source).exists() else str(source),
        "version": gemmakit.__version__,
        "torch": torch.__version__,
    }
    if settings.devices > 1:
        devices.split(model)
    return Prepared(
        settings, model, tokenizer, adapter, examples, questions, objectives["train"], objectives.get("valid"), kept
    )


def _model(settings: TuneSettings, source: str | Path) -> tuple[Any, LoraConfig | None]:
    """The model with what is trained in it, drawn from the seed."""
    dtype = "float32" if settings.method == "full" and settings.dtype == "auto" else settings.dtype
    more = {} if settings.attention is None else {"attn_implementation": settings.attention}
    if settings.quantization is not None:
        more["quantization_config"] = settings.quantization
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=_device(settings), **more)
    torch.manual_seed(settings.seed)
    if settings.method == "full":
        if model.is_quantized:
            raise InputError(f"{source} is quantized, and codes cannot be trained: leave --full out, which is QLoRA.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(f".{part}." in f".{name}." for part in settings.freeze))
        memory.require_state(model, sum(p.nbytes for p in model.parameters()))
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # mapped from the file until now: an optimizer writes
        adapter = None
    else:
        alpha = 2.0 * settings.rank if settings.alpha is None else settings.alpha
        adapter = LoraConfig(
            r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, use_dora=settings.method == "dora",
            target_modules=settings.targets if settings.targets != ALL_LINEAR else LoraConfig().target_modules,
        )  # fmt: skip
        add_adapter(model, adapter)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"freeze {settings.freeze} leaves nothing to train.")
    if adapter is not None:
        memory.require_state(model)
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
    if settings.backend == "flax":
        model = _in_flax(model, source, dtype)
    return model, adapter


def _in_flax(model: Any, source: str | Path, dtype: str) -> Any:
    try:
        from gemmakit.tune.flax import FlaxModel  # late: it loads JAX
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"--backend flax needs the package {error.name}: pip install 'gemmakit[flax]'."
        ) from None
    return FlaxModel(model, source, dtype)


def _device(settings: TuneSettings) -> Any:
    """Where PyTorch's weights are; JAX has a device of its own."""
    if settings.backend == "flax":
        return "cpu"
    if settings.devices > 1:
        return devices.local(parse_device(settings.device))
    return "auto" if settings.device == "auto" else parse_device(settings.device)


def _encoder(settings: TuneSettings, tokenizer: Any, model: Any) -> Encoder:
    context = model.config.max_position_embeddings
    limit = settings.max_length or context
    if limit > context:
        raise InputError(f"--max-length is {limit}, but the model has {context} positions.")
    return Encoder(tokenizer, limit, settings.truncate, settings.chat, settings.train_on == "all")


def _check_chat(settings: TuneSettings, source: Source) -> None:
    if settings.chat and not any(isinstance(row.values.get("prompt"), str) for row in source.rows):
        raise InputError(
            f"chat=True has no use with {source.path}, where no row has a prompt that is a text: messages are turns "
            "already. Leave it out."
        )


def _encoded(settings: TuneSettings, encoder: Encoder, rows: Any) -> list[Any]:
    return encoder.examples(rows) if settings.loss == "sft" else encoder.pairs(rows)


def _questions(encoder: Encoder, source: Source, settings: TuneSettings) -> list[Question]:
    made = map(encoder.question, source.rows[: settings.judge_rows])
    return [question for question in made if question is not None]


def _check_amount(settings: TuneSettings, rows: int) -> None:
    if settings.batch_size > rows:
        raise InputError(f"--batch-size is {settings.batch_size}, but there are {rows} rows: it must be 1 to {rows}.")


def _objective(settings: TuneSettings, model: Any, tokenizer: Any, made: list[Example] | list[Pair], room: int) -> Any:
    pad = tokenizer.pad_token_id or 0
    if settings.loss == "sft":
        packs = room if settings.packing else None
        return NextTokens(made, pad, settings.loss_chunk, packs, _joined(settings, model))  # type: ignore[arg-type]
    reference = None
    if settings.loss == "dpo":
        model.eval()
        reference = reference_logprobs(model, made, pad, settings.loss_chunk).cpu()  # type: ignore[arg-type]
    return Preferences(made, pad, settings.loss_chunk, settings.beta, reference)  # type: ignore[arg-type]


def _joined(settings: TuneSettings, model: Any) -> int:
    """Up to how many tokens examples may stand end to end in one row, at no cost: each is attended to by itself."""
    if settings.backend == "flax" or settings.neftune or not model.config.is_causal:
        return 0  # JAX compiles each width anew; the noise is as large as a row's length says
    if model.config.attn_implementation not in SEGMENTED:
        return 0
    return min((w for w in model.model.windows if w is not None), default=model.config.max_position_embeddings)


def _digest(folder: Path) -> str:
    kinds = (".safetensors", ".json", ".model", ".gguf", ".msgpack")
    files = [folder] if folder.is_file() else [p for p in folder.iterdir() if p.suffix in kinds]
    return sampled_digest(files)


# -- a run -------------------------------------------------------------------------------------------------------------


def tune(settings: TuneSettings, *, overwrite: bool = False, tell: Tell | None = None) -> Result:
    """Train, and write the result to `settings.out`: an adapter in PEFT's files or a model, metrics, a card, a curve.

    Raises InputError for settings, rows and folders that do not do, before the first step; NumericalError where
    gradients stay no numbers; CheckpointError where the disk refuses.
    """
    folder = Path(settings.out).expanduser()
    devices.meet(settings.devices, parse_device(settings.device))
    devices.by_first(lambda: _check_folder(folder, overwrite, settings))
    made = prepare(settings)
    with devices.by_first(lambda: closing(_begin(folder, made))) or nullcontext() as trackers:
        return _train(made, folder, None, trackers, tell)


def _begin(folder: Path, made: Prepared) -> Trackers:
    """The trackers; once all of them have begun, the run takes the place of what another left in the folder."""
    left = [path for pattern in LEFT for path in folder.glob(pattern)]
    with replacing(folder / SETTINGS) as staged:
        staged.write_text(json.dumps(made.kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
        trackers = Trackers(made.settings.track, folder, made.kept["settings"], staged.stat().st_mtime_ns)
        for path in left:
            state.remove(path)
    return trackers


def resume(folder: str | os.PathLike[str], *, tell: Tell | None = None, **changes: Any) -> Result:
    """Go on with a run from where it was last saved; on a CPU to the bit as if it had not ended.

    changes: settings that decide nothing of what is computed, such as save_steps. With another number of devices the
    data is the same, and sums are rounded otherwise. Raises InputError for others, and
    where the data or the model is not what it was.
    """
    folder = Path(folder).expanduser()
    if not (folder / SETTINGS).is_file():
        raise InputError(f"{folder} holds no run to go on with: there is no {SETTINGS}.")
    before = _kept(folder / SETTINGS)
    settings = TuneSettings.from_dict({**before["settings"], "out": str(folder)}, str(folder / SETTINGS))
    TuneSettings.check_names(changes, "resume")
    changes.setdefault("devices", devices.running())  # any number goes on
    different = {k: v for k, v in changes.items() if v != getattr(settings, k)}
    fixed = sorted(different.keys() - FREE)
    if fixed:
        told = ", ".join(f"{k} {getattr(settings, k)!r} became {different[k]!r}" for k in fixed)
        raise InputError(f"a run goes on with the settings it began with: {told}. Begin another with --out.")
    made = prepare(dataclasses.replace(settings, **different))
    for what, (old, new) in _differences(before, made.kept).items():
        raise InputError(
            f"{what} is not what the run began with (SHA-256 {old:.16}..., now {new:.16}...): it cannot go on."
        )
    held, begun = state.load(folder), (folder / SETTINGS).stat().st_mtime_ns
    step = 0 if held is None else held.step
    begin = lambda: Trackers(made.settings.track, folder, made.kept["settings"], begun, step)  # noqa: E731
    with devices.by_first(lambda: closing(begin())) or nullcontext() as trackers:
        return _train(made, folder, held, trackers, tell)


def _kept(path: Path) -> dict[str, Any]:
    """What tune.json holds. Raises CheckpointError where it is damaged."""
    kept = read_json_object(path)
    settings, data, model = (kept.get(name) for name in ("settings", "data", "model"))
    files = data.values() if isinstance(data, dict) else [None]
    whole = all(isinstance(file, dict) and isinstance(file.get("digest"), str) for file in files)
    if not isinstance(settings, dict) or not isinstance(model, str) or not whole:
        raise CheckpointError(f"{path} is not what gemmakit tune wrote: begin anew with --overwrite.")
    return kept


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    found = {f"the {split} data": split for split in before["data"].keys() | now["data"].keys()}
    pairs = {
        what: tuple(kept["data"].get(split, {}).get("digest", "nothing") for kept in (before, now))
        for what, split in found.items()
    }
    pairs["the model"] = (before["model"], now["model"])
    return {what: pair for what, pair in pairs.items() if pair[0] != pair[1]}  # type: ignore[misc]


def _check_folder(folder: Path, overwrite: bool, settings: TuneSettings) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder.")
    for what in ("model", "data"):  # --overwrite would take it away
        if folder.resolve() == Path(getattr(settings, what)).expanduser().resolve():
            raise InputError(f"--out {folder} is the folder of the {what}: name another.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        run = (folder / SETTINGS).is_file()
        how = (
            f"gemmakit tune {folder} --resume goes on with it, --overwrite begins anew"
            if run
            else "name another folder"
        )
        raise InputError(f"--out {folder} is not empty: {how}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error.strerror}.") from None


def _train(
    made: Prepared, folder: Path, held: state.State | None, trackers: Trackers | None, tell: Tell | None
) -> Result:
    settings, trainer = made.settings, Trainer(made.model, made.objective, made.settings)
    torch.manual_seed(settings.seed)
    if held is not None:
        trainer.go_on_from(held)
    metrics = report.Metrics(folder, None if held is None else held.step, trackers)
    try:
        if held is None:
            _judge(made, trainer, metrics, last=True)
        with _ctrl_c() as pressed:
            while trainer.done < trainer.total:
                step = trainer.step()
                metrics.put(**dataclasses.asdict(step))
                if tell is not None:
                    tell(step, trainer.total)
                last = trainer.done == trainer.total
                if not last and trainer.done % settings.eval_steps == 0:
                    _judge(made, trainer, metrics)
                stop = devices.any_of(bool(pressed), made.model.device)
                if stop or last or trainer.done % settings.save_steps == 0:
                    held = trainer.state()  # after all that is measured at this step
                    state.save(folder, held)
                if stop:
                    return Result(folder, False, metrics.records)
        trainer.take_average()
        _judge(made, trainer, metrics, last=True)
        _write(made, folder)
        if devices.is_first():
            report.card(folder, made.kept, metrics.records, report.plot(folder, metrics.records))
        return Result(folder, True, metrics.records)
    finally:
        metrics.close()


def _judge(made: Prepared, trainer: Trainer, metrics: report.Metrics, last: bool = False) -> None:
    """Held-out loss and, first and last, how many answers are right; what was measured at this step stands."""
    step = trainer.done
    with trainer.looking() as model:
        if made.valid is not None and not metrics.has(step, "valid_loss"):
            metrics.put(step=step, valid_loss=mean_loss(model, made.valid, made.settings.batch_size))
        if last and made.questions and not metrics.has(step, "accuracy"):
            speaking = model.to_generate() if made.settings.backend == "flax" else model
            metrics.put(step=step, accuracy=accuracy(speaking, made.tokenizer, made.questions))


def _write(made: Prepared, folder: Path) -> None:
    if made.adapter is not None:
        save_adapter(made.model, made.adapter, folder, base=made.settings.model)
        return
    made.model.save_pretrained(folder, is_main_process=devices.is_first())
    if devices.is_first():
        made.tokenizer.save_pretrained(folder)


@contextmanager
def _ctrl_c() -> Generator[list[bool], None, None]:
    """A list that is no longer empty once Ctrl-C was pressed: the step is done, and saved. The next one ends it now."""
    pressed: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# -- merging -----------------------------------------------------------------------------------------------------------


def merge(model: str, adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Fold an adapter into a model, and save the whole with its tokenizer. Raises InputError, CheckpointError."""
    target = Path(out).expanduser()
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty: name another folder.")
    source = demo_model() if model == "demo" else model
    loaded = AutoModelForCausalLM.from_pretrained(source)
    load_adapter(loaded, adapter)
    merge_adapter(loaded)
    loaded.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
