"""AdamW over what is trained, by name; weights in bfloat16 are stepped in float32 and rounded at random."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gemmakit.tune.devices import part, part_of, shared_out
from gemmakit.tune.settings import TuneSettings

STATE_BYTES = 12  # a parameter: its gradient and two moments, in float32
STATES = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """torch's AdamW, a group a parameter. Moments are float32.

    A weight in bfloat16 has 8 bits: most steps of an optimizer are smaller than half of its last, and would be lost.
    So it is stepped in float32 and rounded up or down at random, on average to where it should be (arXiv:2010.06192).
    Of a weight that is shared out that copy is of this process's part.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float):
        self.parameters = dict(parameters)
        self.wide = {
            n: p if p.dtype == torch.float32 else nn.Parameter(part(p.detach()).float()) for n, p in parameters.items()
        }
        matrices = {n for n, p in parameters.items() if p.dim() > 1}
        self.adams = {
            n: torch.optim.AdamW([p], weight_decay=weight_decay if n in matrices else 0.0, foreach=False)
            for n, p in self.wide.items()
        }
        self._release()

    def step(self, lr: float) -> None:
        for name, adam in self.adams.items():
            parameter, wide = self.parameters[name], self.wide[name]
            if parameter.grad is None:
                continue
            adam.param_groups[0]["lr"] = lr
            if wide is not parameter:
                wide.data, wide.grad = part(parameter.detach()).float(), part(parameter.grad).float()
            adam.step()
            if wide is not parameter:
                part(parameter.detach()).copy_(rounded_at_random(wide.detach()))
        self._release()

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _release(self) -> None:
        """Between steps a copy in float32 is a memory of nothing."""
        for name, wide in self.wide.items():
            if wide is not self.parameters[name]:
                wide.data, wide.grad = wide.data.new_empty(0), None

    def tensors(self) -> dict[str, Tensor]:
        """Moments and counts by "NAME/exp_avg" and the like."""
        return {
            f"{name}/{key}": self._as_shared(name, key, adam.state[self.wide[name]][key])
            for name, adam in self.adams.items()
            for key in STATES
            if self.wide[name] in adam.state
        }

    def _as_shared(self, name: str, key: str, tensor: Tensor) -> Tensor:
        """What a copy of this process's part has, as part of a whole."""
        parameter = self.parameters[name]
        return tensor if key == "step" or self.wide[name] is parameter else shared_out(tensor, parameter)

    def like(self) -> dict[str, Tensor]:
        """What `tensors` are once every parameter had a gradient, by "optimizer/NAME/exp_avg" and the like."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            moment = torch.empty_like(parameter, dtype=torch.float32)
            found |= {f"optimizer/{name}/{key}": torch.zeros(()) if key == "step" else moment for key in STATES}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, adam in self.adams.items():
            if f"{name}/step" in tensors:
                moments = {key: tensors[f"{name}/{key}"].clone() for key in STATES}
                like, wide = self.parameters[name], self.wide[name]
                own = (lambda t: t) if wide is like else part
                adam.state[wide] = {k: t if k == "step" else own(part_of(t, like)) for k, t in moments.items()}


def rounded_at_random(x: Tensor) -> Tensor:
    """bfloat16 of float32 numbers, the nearer of the two around each the likelier, by torch's generator."""
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return torch.where(x.isfinite(), ((bits + noise) & -(1 << 16)).view(torch.float32), x).bfloat16()


def learning_rate(settings: TuneSettings, step: int, total: int) -> float:
    """Of a step counted from 0: up in a line over the warmup, then as the schedule says, to 0 after the last step."""
    warmup = min(total - 1, math.ceil(settings.warmup * total))
    if step < warmup:
        return settings.rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.rate * factors[settings.schedule]
