"""From a step's scores to a token a row, without waiting for the device.

A score row that holds no number to choose by (NaN, +inf, everything forbidden) gives NO_TOKEN, never a silent token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gemmakit.pytorch.shapes import Float, Int

NO_TOKEN = -1
Pick = Callable[[Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]
# Scores that are looked through together.
LINE = 512


def greedy(scores: Float[Tensor, "R V"]) -> Int[Tensor, " R"]:
    """The first largest of each row."""
    return sound(*largest(scores))


def largest(scores: Float[Tensor, "R V"]) -> tuple[Float[Tensor, " R"], Int[Tensor, " R"]]:
    """The maximum of each row, NaN if anything is, and the first place where it stands."""
    V = scores.shape[1]
    if not scores.is_cpu or V < LINE:
        return scores.max(dim=-1)
    # On the CPU torch finds a maximum with its place one number at a time, a maximum alone in vectors.
    whole = V // LINE * LINE
    lines = scores[:, :whole].unflatten(1, (-1, LINE)).amax(-1)
    if whole < V:
        lines = torch.cat((lines, scores[:, whole:].amax(-1, keepdim=True)), dim=1)
    start = (lines.max(dim=-1, keepdim=True).indices * LINE).clamp_max(V - LINE)
    best, place = scores.gather(1, start + torch.arange(LINE, device=scores.device)).max(dim=-1)
    return best, start[:, 0] + place


def sound(best: Float[Tensor, " R"], token: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The tokens, NO_TOKEN where the best score is no finite number."""
    return torch.where(best - best == 0, token, NO_TOKEN)


class Exponential:
    """A source of Exp(1) noise: one generator for all rows, one a row, or torch's.

    Whatever is drawn, comes from here: p / noise has its maximum at token i with probability p_i, and exp(-noise) is
    uniform on (0, 1).
    """

    def __init__(self, generators: torch.Generator | Sequence[torch.Generator] | None):
        if isinstance(generators, Sequence) and len(generators) == 1:
            generators = generators[0]  # the rows of one prompt share its generator
        self._generators = generators

    def __call__(self, like: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Noise of this shape."""
        return self.fill(torch.empty_like(like))

    def fill(self, out: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """The same, into `out`."""
        if isinstance(self._generators, Sequence):
            for row, generator in zip(out, self._generators, strict=True):
                row.exponential_(generator=generator)
            return out
        return out.exponential_(generator=self._generators)

    def state(self, like: Tensor) -> Tensor:
        """Of what draws for one row on the device of `like`, to `restore`."""
        return self._generator(like).get_state()

    def restore(self, state: Tensor, like: Tensor) -> None:
        self._generator(like).set_state(state)

    def _generator(self, like: Tensor) -> torch.Generator:
        if isinstance(self._generators, torch.Generator):
            return self._generators
        assert self._generators is None, "rows of several generators have a state each"
        if like.device.type == "cuda":
            return torch.cuda.default_generators[like.device.index or 0]
        return torch.default_generator


def sampler(noise: Noise) -> Pick:
    """Draw from softmax(scores).

    Dividing by exponential noise and taking the largest draws exactly by probability, and needs no host.
    """

    def pick(scores: Float[Tensor, "R V"]) -> Int[Tensor, " R"]:
        probabilities = scores.softmax(-1)
        token = (probabilities / noise(probabilities)).argmax(-1)
        return sound(scores.amax(-1), token)

    return pick


def row_generators(seed: int, prompts: Sequence[Sequence[int]], device: torch.device) -> list[torch.Generator]:
    """One generator a row, from the seed and how many equal prompts stand above it.

    So a row draws the same whatever its neighbours are, and copies of one prompt still differ.
    """
    seen: dict[tuple[int, ...], int] = {}
    out = []
    for prompt in prompts:
        copy = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
        # An odd multiplier spreads copies of one seed away from the seeds next to it.
        out.append(torch.Generator(device).manual_seed((seed + copy * 0x9E3779B97F4A7C15) % 2**63))
    return out
