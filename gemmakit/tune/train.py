"""The loop: batches of a step, their gradients, one step of the optimizer; the same for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.errors import NumericalError
from gemmakit.tune import devices, state
from gemmakit.tune.batches import Order, to
from gemmakit.tune.objectives import Objective
from gemmakit.tune.optimizer import Optimizer, learning_rate
from gemmakit.tune.settings import TuneSettings

MAX_SKIPPED = 3  # steps in a row without a finite gradient


@dataclass(frozen=True)
class Step:
    """What one step was: counted from 1; loss the mean over what it learnt, gradient the length before clipping."""

    step: int
    loss: float
    gradient: float
    lr: float
    tokens: int
    seconds: float
    skipped: bool = False


class Trainer:
    """A model in training, what it minimises, and where it stands."""

    def __init__(self, model: Any, objective: Objective, settings: TuneSettings):
        self.model, self.objective, self.settings = model, objective, settings
        self.order = Order(len(objective), settings.batch_size, settings.accumulate, settings.seed)
        self.total = settings.max_steps or settings.epochs * self.order.steps_per_epoch
        self.trained: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(self.trained, settings.weight_decay)
        self.average = {n: p.detach().float().clone() for n, p in self.trained.items()} if settings.ema else {}
        self.done, self.skipped, self._in_a_row = 0, 0, 0

    def step(self) -> Step:
        """The next step. A gradient that is no number changes nothing; several in a row end the run.

        Raises NumericalError, naming the rows.
        """
        start, number = time.perf_counter(), self.done
        passes = self.order.step(number)
        loss, tokens = self.accumulate(passes)
        gradient = self._clip()
        lr, fine = learning_rate(self.settings, number, self.total), math.isfinite(loss) and math.isfinite(gradient)
        if fine:
            self.optimizer.step(lr)
            self._follow()
        self.optimizer.zero_grad()
        self.done += 1
        self._count(fine, loss, gradient, [line for units in passes for line in self.objective.where(units)])
        return Step(self.done, loss, gradient, lr, tokens, time.perf_counter() - start, not fine)

    def accumulate(self, passes: list[list[int]]) -> tuple[float, int]:
        """Leave the gradients of all passes together; their loss, and their tokens with padding."""
        batches = [self.objective.batch(units) for units in passes]
        items = sum(map(self.objective.items, batches))
        loss, tokens = 0.0, 0
        self.model.train()
        self.optimizer.zero_grad()
        with noisy_embeddings(self.model, self.settings.neftune):
            for units, batch in zip(passes, batches, strict=True):
                own = devices.own(units)
                if len(own) < len(units):  # a process without rows runs another's for nothing: it gathers with the rest
                    batch = self.objective.batch(own or units[:1])
                part = self.objective.loss(self.model, to(batch, self.model.device), items) * bool(own)
                part.backward()
                loss += part.item()
                tokens += batch["input_ids"].numel() * bool(own)
        loss, total = devices.summed((loss, tokens), self.model.device)
        return loss, int(total)

    def _clip(self) -> float:
        """The length of the whole gradient, which is cut to the setting's."""
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = devices.whole(torch.nn.utils.get_total_norm(gradients, foreach=False))
        if self.settings.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), self.settings.clip, norm, foreach=False)
        return float(norm)

    @torch.no_grad()
    def _follow(self) -> None:
        for name, mean in self.average.items():
            mean.lerp_(self.trained[name].float(), 1 - self.settings.ema)

    def _count(self, fine: bool, loss: float, gradient: float, lines: list[str]) -> None:
        self._in_a_row = 0 if fine else self._in_a_row + 1
        self.skipped += not fine
        if self._in_a_row >= MAX_SKIPPED:
            raise NumericalError(
                f"step {self.done}: the loss is {loss} and the gradient's length {gradient}. That is no number, as in "
                f"the {MAX_SKIPPED - 1} steps before, here of {', '.join(lines[:8])}. Lower --lr, look at these "
                "rows, or train in --dtype float32 or bfloat16."
            )

    # -- where it stands ---------------------------------------------------------------------------------------------

    def state(self) -> state.State:
        """What any number of processes goes on from, each tensor as it is shared out; every process calls this."""
        drawn = devices.of_first(state.random_states(self.model.device))
        tensors = {n: t.detach() for n, t in self._held().items()}
        return state.State(self.done, self.skipped, {**tensors, **drawn})

    def _held(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"weights/{n}": p for n, p in self.trained.items()}
        tensors |= {f"optimizer/{n}": t for n, t in self.optimizer.tensors().items()}
        return tensors | {f"average/{n}": t for n, t in self.average.items()}

    @torch.no_grad()
    def go_on_from(self, held: state.State) -> None:
        if held.parts is not None:
            like = {n: torch.empty_like(t) for n, t in (self._held() | self.optimizer.like()).items()}
            held = state.read_parts(held, {n: t.detach() for n, t in like.items()}, self.model.device)
        found = held.tensors
        for name, parameter in self.trained.items():
            parameter.copy_(devices.part_of(found[f"weights/{name}"], parameter))
        for name, mean in self.average.items():
            mean.copy_(devices.part_of(found[f"average/{name}"], mean))
        self.optimizer.load({n.removeprefix("optimizer/"): t for n, t in found.items() if n.startswith("optimizer/")})
        self.done, self.skipped = held.step, held.skipped
        state.set_random_states(found, self.model.device)

    @torch.no_grad()
    def take_average(self) -> None:
        """The average in the place of the last weights, if one is kept."""
        for name, mean in self.average.items():
            self.trained[name].copy_(mean)

    @contextmanager
    def looking(self) -> Generator[Any, None, None]:
        """The model in evaluation mode; draws made meanwhile are none of the run's."""
        held = state.random_states(self.model.device)
        self.model.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.model.train()
            state.set_random_states(held, self.model.device)


@contextmanager
def noisy_embeddings(model: Any, alpha: float) -> Generator[None, None, None]:
    """Add alpha / sqrt(S D) times uniform noise in -1..1 to what is embedded. Source: arXiv:2310.05914."""
    if not alpha:
        yield
        return

    def shake(module: nn.Module, ids: Any, embedded: Tensor) -> Tensor:
        S, D = embedded.shape[-2:]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * (alpha / math.sqrt(S * D))

    handle = model.get_input_embeddings().register_forward_hook(shake)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def mean_loss(model: Any, objective: Objective, batch_size: int) -> float:
    """The objective's mean over all its units, which do not depend on how they are batched but for rounding."""
    batches = [
        objective.batch(range(i, min(i + batch_size, len(objective)))) for i in range(0, len(objective), batch_size)
    ]
    total = sum(map(objective.items, batches))
    return sum(objective.loss(model, to(batch, model.device), total).item() for batch in batches)
