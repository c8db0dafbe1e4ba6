"""pipeline(): from texts to results in one call. A task is a small class: how one input looks, how a batch is run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch

from gemmakit.auto import AutoModelForCausalLM, AutoTokenizer
from gemmakit.config import HUB_ARGUMENTS, GemmaConfig
from gemmakit.errors import InputError, PromptTooLong
from gemmakit.hub import demo_model

DEFAULT_NEW_TOKENS = 256
PROGRESS_AFTER_S = 2.0

Message = Mapping[str, Any]
Record = dict[str, Any]


class Pipeline:
    """A model, its tokenizer, and what lies between an input and a result.

    Called with one input it gives one result; with a list, a list; with any other iterable, an iterator that works as
    it is read. Results do not depend on what else is in the batch.

    Args:
        model, tokenizer: loaded ones.
        device: "cpu", "cuda", "cuda:1", a torch.device, or a CUDA index (-1: the CPU). None leaves the model alone.
        batch_size: inputs a forward pass, unless a call says otherwise.
        options: defaults of the calls' own arguments.
    """

    task: ClassVar[str]
    model_class: ClassVar[Any]

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: int | str | torch.device | None = None,
        batch_size: int = 1,
        **options: Any,
    ):
        self.model = model if device is None else model.to(_device(device))
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.options = options

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        options = {**self.options, **options}
        size = _batch_size(self.batch_size if batch_size is None else batch_size)
        if self.is_one(inputs):
            return self.run([inputs], **options)[0]
        if isinstance(inputs, (list, tuple)):
            quiet = options.get("streamer") is not None
            return list(_with_progress(self._results(inputs, size, options), 0 if quiet else len(inputs)))
        if isinstance(inputs, Iterable) and not isinstance(inputs, (Mapping, bytes)):
            return self._results(inputs, size, options)
        raise InputError(f"{self.task} takes {self.takes}, or several of them; found {type(inputs).__name__}.")

    def _results(self, inputs: Iterable[Any], size: int, options: dict[str, Any]) -> Iterator[Any]:
        rest = iter(inputs)
        while batch := list(islice(rest, size)):
            for index, item in enumerate(batch):
                if not self.is_one(item):
                    raise InputError(f"{self.task} takes {self.takes}; item {index} of a batch is {item!r:.80}.")
            yield from self.run(batch, **options)

    # -- what a task defines ---------------------------------------------------------------------------------------

    takes: ClassVar[str]

    def is_one(self, inputs: Any) -> bool:
        """Whether this is a single input rather than several."""
        raise NotImplementedError

    def run(self, batch: Sequence[Any], **options: Any) -> list[Any]:
        """The results of a batch, in its order."""
        raise NotImplementedError


class TextGenerationPipeline(Pipeline):
    """Continues texts, and answers chats (lists of {"role": ..., "content": ...}).

    A result is a list of `num_return_sequences` dictionaries: {"generated_text": prompt and continuation}; for a chat,
    all messages with the assistant's new one at the end. Without max_new_tokens or max_length, up to 256 new tokens,
    fewer where the context ends.

    Arguments of a call:
        return_full_text: False leaves out the prompt; for a chat "generated_text" is then the answer alone.
        return_tensors: {"generated_token_ids": [...]} instead, prompt included.
        clean_up_tokenization_spaces, skip_special_tokens (True): as in `tokenizer.decode`.
        prefix: put in front of every text prompt.
        continue_final_message: go on with a chat's last message; None does so where the assistant said it.
        streamer: told of the tokens as they come; inputs then run one at a time.
        Everything else goes to `model.generate`, which refuses what it does not know.
    """

    task = "text-generation"
    takes = "a text or a chat (a list of {'role': ..., 'content': ...})"
    model_class = AutoModelForCausalLM

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, str) or _is_chat(inputs)

    def encode(
        self, prompt: str | Sequence[Message], *, prefix: str = "", continue_final_message: bool | None = None
    ) -> list[int]:
        """The ids of a text or a chat, with exactly one <bos>."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prefix + prompt)["input_ids"])
        goes_on = _goes_on(prompt, continue_final_message)
        rendered = self.tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
        return list(rendered["input_ids"])

    def run(
        self,
        batch: Sequence[str | Sequence[Message]],
        *,
        return_full_text: bool | None = None,
        return_tensors: bool = False,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        skip_special_tokens: bool = True,
        prefix: str = "",
        continue_final_message: bool | None = None,
        **settings: Any,
    ) -> list[list[Record]]:
        if return_tensors and (return_text or return_full_text is not None):
            raise InputError("return_tensors excludes return_text and return_full_text: choose ids or text.")
        rows = [self.encode(p, prefix=prefix, continue_final_message=continue_final_message) for p in batch]
        news = self._continue(rows, settings)
        if return_tensors:
            return [[{"generated_token_ids": row + new} for new in many] for row, many in zip(rows, news, strict=True)]

        def record(prompt: Any, new: list[int]) -> Record:
            text = self.tokenizer.decode(
                new,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            )
            whole = return_full_text in (None, True)
            return {"generated_text": _joined(prompt, text, prefix, continue_final_message) if whole else text}

        return [[record(p, new) for new in many] for p, many in zip(batch, news, strict=True)]

    def _continue(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[list[list[int]]]:
        """For each row its `num_return_sequences` continuations, without padding."""
        if not rows:
            return []
        settings = {**settings, "tokenizer": self.tokenizer}
        config = (settings.get("generation_config") or self.model.generation_config).updated()
        # Rows with different room run apart, or the longest prompt would shorten the others' answers.
        groups: dict[int | None, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(self.room(len(row), config, settings), []).append(index)
        out: list[list[list[int]]] = [[] for _ in rows]
        for room, members in groups.items():
            limit = {} if room is None else {"max_new_tokens": room}
            alone = settings.get("streamer") is not None
            for group in [[i] for i in members] if alone else [members]:
                for index, news in zip(
                    group, self._generate([rows[i] for i in group], {**settings, **limit}), strict=True
                ):
                    out[index] = news
        return out

    def room(self, prompt: int, config: Any, settings: Mapping[str, Any]) -> int | None:
        """New tokens for a prompt of this length; None where generate() itself knows or has to refuse."""

        def asked(name: str) -> Any:
            return settings.get(name, getattr(config, name))

        if asked("max_new_tokens") is not None:
            return None
        limit = asked("max_length")
        if limit is not None:
            return limit - prompt if isinstance(limit, int) and limit > prompt else None
        context = self.model.config.max_position_embeddings
        if prompt >= context:
            raise PromptTooLong(f"prompt has {prompt} tokens, but the context holds {context}. Shorten the prompt.")
        return min(DEFAULT_NEW_TOKENS, context - prompt)

    def _generate(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[list[list[int]]]:
        ids, mask = _left_padded(rows, self.tokenizer.pad_token_id or 0, self.model.device)
        out = self.model.generate(ids, attention_mask=mask, **settings)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        config = (settings.get("generation_config") or self.model.generation_config).updated(
            **{k: settings[k] for k in ("eos_token_id", "pad_token_id") if k in settings}
        )
        news = [_ended(row, config.eos_token_ids, config.pad_token_id) for row in sequences[:, ids.shape[1] :].tolist()]
        each = len(news) // len(rows)
        return [news[i * each : (i + 1) * each] for i in range(len(rows))]


TASKS: dict[str, type[Pipeline]] = {TextGenerationPipeline.task: TextGenerationPipeline}


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: GemmaConfig | str | None = None,
    tokenizer: Any = None,
    *,
    framework: str | None = None,
    use_fast: bool = True,
    device: int | str | torch.device | None = None,
    device_map: int | str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    trust_remote_code: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    pipeline_class: type[Pipeline] | None = None,
    **kwargs: Any,
) -> Any:
    """Load what a task needs and give back something to call.

    Args:
        task: one of `TASKS`; None means "text-generation".
        model: a folder, a Hub id, or a loaded model. None takes the demo model that gemmakit carries.
        config: instead of the checkpoint's config.json.
        tokenizer: a loaded one or where to find it; None takes the model's.
        device: "cpu", "cuda", "cuda:1", a torch.device, or a CUDA index (-1: the CPU). device_map: the same, or "auto".
            With neither, the first accelerator if there is one.
        dtype: "auto", the default, keeps what the checkpoint holds. `torch_dtype` is the older name of the same.
        model_kwargs: more arguments for the model's from_pretrained.
        kwargs: revision, token, cache_dir, local_files_only, subfolder; batch_size; and defaults for the calls.

    Raises:
        InputError: an unknown task, or arguments that contradict each other; everything that loading raises.
    """
    made = pipeline_class or _task(task)
    if framework not in (None, "pt"):
        raise InputError(f"framework is {framework!r}; pipelines run on PyTorch ('pt').")
    if device is not None and device_map is not None:
        raise InputError("device and device_map are both given: give one of them.")
    where = {k: kwargs.pop(k) for k in HUB_ARGUMENTS if k in kwargs}
    source = demo_model() if model is None else model
    if isinstance(source, (str, Path)):
        loading = {**where, **(model_kwargs or {}), "trust_remote_code": trust_remote_code}
        if config is not None:
            loading["config"] = (
                config if isinstance(config, GemmaConfig) else GemmaConfig.from_pretrained(config, **where)
            )
        placed = device_map or "auto" if device is None else device
        placed = _device(placed) if isinstance(placed, (int, str)) and placed != "auto" else placed
        chosen = torch_dtype if dtype is None else dtype
        source = made.model_class.from_pretrained(source, device_map=placed, dtype=chosen, **loading)
        device = None
    elif any(x is not None for x in (config, dtype, torch_dtype, device_map, model_kwargs)) or where:
        raise InputError("config, dtype, device_map, model_kwargs and revision are for loading; this model is loaded.")
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_source(tokenizer, source), use_fast=use_fast, **where)
    return made(source, tokenizer, device=device, **kwargs)


def _task(name: str | None) -> type[Pipeline]:
    found = TASKS.get(name or "text-generation")
    if found is None:
        raise InputError(f"there is no task {name!r}; gemmakit has {', '.join(TASKS)}.")
    return found


def _tokenizer_source(tokenizer: str | Path | None, model: Any) -> str | Path:
    name = tokenizer or getattr(model, "name_or_path", "")
    if not name:
        raise InputError("this model was not loaded from anywhere, so its tokenizer is not known: pass tokenizer=.")
    return name


def _device(device: int | str | torch.device) -> torch.device:
    name = str(device)
    try:
        found = torch.device("cpu" if name == "-1" else int(name) if name.isdigit() else device)
    except RuntimeError:
        raise InputError(f"there is no device {device!r}; give 'cpu', 'cuda', 'cuda:1', 'mps' or a number.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} asks for CUDA, and torch sees no CUDA device. Use device 'cpu'.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices.")
    return found


def _batch_size(size: Any) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"batch_size is {size!r}; it must be a whole number >= 1.")
    return size


def _is_chat(inputs: Any) -> bool:
    return isinstance(inputs, (list, tuple)) and bool(inputs) and all(isinstance(m, Mapping) for m in inputs)


def _goes_on(chat: Sequence[Message], asked: bool | None) -> bool:
    return chat[-1].get("role") in ("assistant", "model") if asked is None else asked


def _joined(prompt: str | Sequence[Message], text: str, prefix: str, goes_on: bool | None) -> Any:
    if isinstance(prompt, str):
        return prefix + prompt + text
    if _goes_on(prompt, goes_on):
        return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + text}]
    return [*prompt, {"role": "assistant", "content": text}]


def _left_padded(rows: Sequence[list[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, (B, P), the rows' last tokens in line."""
    P = max(map(len, rows))
    ids = torch.tensor([[pad] * (P - len(row)) + row for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[0] * (P - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _ended(new: list[int], eos: Sequence[int], pad: int | None) -> list[int]:
    """A row up to its eos, or without the padding that follows another end."""
    for place, token in enumerate(new):
        if token in eos:
            return new[: place + 1]
    end = len(new)
    while end and new[end - 1] == pad:
        end -= 1
    return new[:end]


def _with_progress(results: Iterator[Any], total: int, clock: Callable[[], float] = time.monotonic) -> Iterator[Any]:
    """The results; on a terminal, when they take more than a moment, with a bar on stderr."""
    if total < 2 or not sys.stderr.isatty():
        yield from results
        return
    start, bar, task = clock(), None, None
    try:
        for done, result in enumerate(results, 1):
            if bar is None and done < total and clock() - start > PROGRESS_AFTER_S:
                bar = _bar()
                task = bar.add_task("", total=total)
            if bar is not None and task is not None:
                bar.update(task, completed=done)
            yield result
    finally:
        if bar is not None:
            bar.stop()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.start()
    return bar
