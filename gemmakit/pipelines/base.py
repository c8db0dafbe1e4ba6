"""What every task shares: inputs in, batches through the model, results out; and where the model runs."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar

import torch

from gemmakit.checks import Whole, check
from gemmakit.errors import InputError
from gemmakit.hub import push_folder
from gemmakit.progress import with_progress
from gemmakit.pytorch.placement import parse_device

Record = dict[str, Any]


class Pipeline:
    """A model, its tokenizer, and what lies between an input and a result.

    Called with one input it gives one result; with a list, a list; with any other iterable or a data set (what has a
    length and items by number), an iterator that works as it is read. Results do not depend on what else is in the
    batch. `preprocess`, `forward` and `postprocess` are the three parts of a call, for one input.

    Args:
        model, tokenizer: loaded ones.
        device: "cpu", "cuda", "cuda:1", a torch.device, or a CUDA index (-1: the CPU). None leaves the model alone.
        batch_size: inputs a forward pass, unless a call says otherwise.
        num_workers: accepted; texts are encoded in this process.
        options: defaults of the calls' own arguments.
    """

    task: ClassVar[str]
    model_class: ClassVar[Any]
    flax_class: ClassVar[str | None] = None  # the name in `gemmakit` of the same model in Flax

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: int | str | torch.device | None = None,
        batch_size: int = 1,
        num_workers: int | None = None,
        **options: Any,
    ):
        self.model = model if device is None else model.to(parse_device(device))
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        _check_workers(num_workers)
        self.options = options
        self.check_options(options)

    @property
    def device(self) -> torch.device:
        """Where prompts are put; a Flax model takes them from the CPU."""
        return torch.device("cpu") if is_flax(self.model) else self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's weights."""
        return self.model.dtype

    torch_dtype = dtype

    def __call__(
        self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **options: Any
    ) -> Any:
        options = {**self.options, **options}
        self.check_options(options)
        _check_workers(num_workers)
        size = _batch_size(self.batch_size if batch_size is None else batch_size)
        if self.is_one(inputs):
            return self.run([inputs], **options)[0]
        several: Any = inputs  # narrowed, it would lose the type of its items
        if isinstance(inputs, (list, tuple)):
            quiet = options.get("streamer") is not None
            return list(with_progress(self._results(several, size, options), 0 if quiet else len(several)))
        if isinstance(inputs, Iterable) and not isinstance(inputs, (Mapping, bytes)):
            return self._results(several, size, options)
        if _is_data_set(inputs):
            return self._results((several[i] for i in range(len(several))), size, options)
        raise InputError(f"{self.task} takes {self.takes}, or several of them; found {type(several).__name__}.")

    def predict(self, X: Any) -> Any:
        """A call, by scikit-learn's name."""
        return self(X)

    transform = predict

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the model (kwargs as in its save_pretrained) and its tokenizer into a folder."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload both; kwargs go to `gemmakit.hub.push_folder`. The address comes back."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **kwargs)

    def _results(self, inputs: Iterable[Any], size: int, options: dict[str, Any]) -> Iterator[Any]:
        rest = iter(inputs)
        while batch := list(islice(rest, size)):
            for index, item in enumerate(batch):
                if not self.is_one(item):
                    raise InputError(f"{self.task} takes {self.takes}; item {index} of a batch is {item!r:.80}.")
            yield from self.run(batch, **options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises InputError for what the task has no option for, when the pipeline is made and at every call."""
        known = inspect.signature(self.run).parameters
        names = [name for name, p in known.items() if p.kind is p.KEYWORD_ONLY]
        for name in options:
            if name not in names:
                raise InputError(f"{self.task} has no option {name!r}; it has {', '.join(names)}.")

    # -- what a task defines ---------------------------------------------------------------------------------------

    takes: ClassVar[str]

    def is_one(self, inputs: Any) -> bool:
        """Whether this is a single input rather than several."""
        raise NotImplementedError

    # Each task names the options it has, so that others can be refused: a declaration with all of them would hide that.
    run: Callable[..., list[Any]]
    """The results of a batch, in its order; its keyword arguments are the options of a call."""
    preprocess: Callable[..., Record]
    """What the model is given for an input, (1, S); its keyword arguments are among a call's options."""
    forward: Callable[..., Record]
    """What the model makes of it."""
    postprocess: Callable[..., Any]
    """What a call gives; its keyword arguments are among a call's options."""

    def model_inputs(self, row: Sequence[int]) -> Record:
        """A row of ids as the model takes it."""
        ids = torch.tensor([row], dtype=torch.long, device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def is_flax(model: Any) -> bool:
    """Whether a loaded model is one of Flax."""
    return getattr(model, "framework", "pt") == "flax"


def _check_workers(number: Any) -> None:
    if number is not None:
        check("num_workers", number, Whole(0), InputError)


def _is_data_set(inputs: Any) -> bool:
    return (
        not isinstance(inputs, (str, bytes, Mapping)) and hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__")
    )


@contextmanager
def evaluating(model: Any) -> Generator[None, None, None]:
    """Without dropout, also where the model is in the middle of its training."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _batch_size(size: Any) -> int:
    check("batch_size", size, Whole(1), InputError)
    return size


# What of a tokenizer's options says in which form ids come.
_FORM = {"return_tensors", "return_dict", "tokenize", "return_overflowing_tokens", "stride"}


def encoding_options(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tokenizer's options that a caller gave as `name`. Raises InputError for those that the pipeline decides."""
    if form := sorted(_FORM & (given or {}).keys()):
        raise InputError(f"{name} has {', '.join(form)}, which the pipeline decides.")
    return dict(given or {})


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, (B, P), of rows of different lengths; the mask is 0 on padding, which is on `side`."""
    P = max(map(len, rows))

    def line(row: Sequence[int], filler: int) -> list[int]:
        fill = [filler] * (P - len(row))
        return [*fill, *row] if side == "left" else [*row, *fill]

    ids = torch.tensor([line(row, pad) for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor([line([1] * len(row), 0) for row in rows], device=device)
    return ids, mask
