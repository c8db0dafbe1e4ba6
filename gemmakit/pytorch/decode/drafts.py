"""What a text proposes to follow itself, and how many proposals pay.

Nothing here runs a model. Axis letters: k tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import Exponential
from gemmakit.pytorch.shapes import Float

# States of a text's end whose places are kept up to date, so that a token takes a bounded time.
CLIMBED = 16
# What a proposed token adds to a pass, as a share of a pass over one token, until it has been measured here.
WIDTH_COST = {"cuda": 0.02, "cpu": 0.25}
# What proposals must be expected to gain before they are made.
MARGIN = 0.05
# Share of the time that fruitless proposals may take beside CREDIT passes; with the bookkeeping it stays under 5 %.
LOSS = 0.02
CREDIT, MOST_CREDIT = 0.5, 4.0
# Passes that are remembered, and how fast what was seen of a kind of runs, or paid for a token, fades.
REMEMBERED, FADING, FORGIVING = 15, 0.95, 0.998
# How often the token after a run of each kind is expected to be right, and how many that were seen this stands for.
CHANCES, PRIOR = (0.3, 0.5, 0.65, 0.75, 0.85), 4.0
LEAST_COST = 0.005
# What a model proposes is as likely to be right as what follows a long run, until it is known better.
AS_LIKELY = 16
# A model that does not pay is asked again after so many passes.
TRIED_AGAIN = 64


def width_cost(device: torch.device) -> float:
    return WIDTH_COST.get(device.type, WIDTH_COST["cpu"])


class Repeats:
    """The longest run at the text's end that came before, and what followed it where it came last.

    A suffix automaton, which grows by a token in constant time (Blumer et al. 1985, doi:10.1016/0304-3975(85)90157-4).
    A state stands for runs that end at the same places, of which it keeps the newest one known.

    run: length of that run, 0 where the last token is new; no more than `longest`.
    """

    def __init__(self, longest: int = sys.maxsize) -> None:
        self.longest = longest
        self.tokens: list[int] = []
        self.run = 0
        self._after = 0  # the place behind the run where it came before
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]
        self._last = 0

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.append(token)

    def continuation(self, count: int) -> list[int]:
        """What may follow, `count` tokens or none; a run that overlaps its own repetition goes round."""
        if not self.run or not count:
            return []
        period = len(self.tokens) - self._after
        return [self.tokens[self._after + i % period] for i in range(count)]

    def append(self, token: int) -> None:
        following, link, length, end = self._next, self._link, self._length, self._end
        self.tokens.append(token)
        place, made = len(self.tokens), len(length)
        following.append({})
        length.append(place)
        link.append(0)
        end.append(place)
        state = self._last
        while state >= 0 and token not in following[state]:
            following[state][token] = made
            state = link[state]
        if state >= 0:
            target = following[state][token]
            if length[target] == length[state] + 1:
                link[made] = target
            else:
                link[made] = clone = made + 1
                following.append(dict(following[target]))
                length.append(length[state] + 1)
                link.append(link[target])
                end.append(end[target])
                link[target] = clone
                while state >= 0 and following[state].get(token) == target:
                    following[state][token] = clone
                    state = link[state]
        self._last = made
        self._look(link[made], place)

    def _look(self, state: int, place: int) -> None:
        """Find the run among the states of what the text ends with, and note that all of it is here now too."""
        self.run, found = 0, False
        for _ in range(CLIMBED):
            if state <= 0:
                return
            shorter = self._link[state]
            if not found:
                self.run, self._after = min(self._length[state], self.longest), self._end[state]
                found = self._length[shorter] < self.longest
            self._end[state] = place
            state = shorter


class Gain:
    """How many proposed tokens to check in a pass: those that are expected to pay, within what may be lost.

    In units of a pass over one token: n tokens one by one take n. A pass that checks k proposals takes 1 + k * cost and
    decides those that are right and one more. How often a token is right is counted by the length of the run that
    proposes it, whether it was checked or only thought of; what it costs is measured against plain passes, where
    seconds are told. Proposals are made where the best number of them is expected to gain MARGIN.

    Whatever is expected, what they have cost beyond what they saved never passes CREDIT and LOSS a token: a text that
    repeated itself need not go on so, and a machine may be busy with something else.
    """

    def __init__(self, cost: float):
        self.usual = self.cost = cost
        self.balance = CREDIT
        self.chances = [[right * PRIOR, PRIOR] for right in CHANCES]
        self._plain: deque[float] = deque(maxlen=REMEMBERED)
        self._wide: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def count(self, run: int, most: int) -> int:
        """Of at most so many tokens that a run of this length proposes."""
        if not run:
            return 0
        best, expected, likely, gain = 0, 1.0, 1.0, 1 + MARGIN
        for k in range(1, min(most, int(self.balance / self.cost)) + 1):
            likely *= self.chance(run + k - 1)
            expected += likely
            if expected > gain * (1 + self.cost * k):
                best, gain = k, expected / (1 + self.cost * k)
        return best

    def chance(self, run: int) -> float:
        right, all_ = self.chances[_kind(run)]
        return right / all_

    def saw(self, run: int, right: bool) -> None:
        """Whether the token after a run of this length was the one that followed it before."""
        counts = self.chances[_kind(run)]
        counts[0] = counts[0] * FADING + right
        counts[1] = counts[1] * FADING + 1

    def follow(self, repeats: Repeats, new: Sequence[int]) -> None:
        """Tokens that have come: how often each was the one that the text proposed, and the text with them."""
        for token in new:
            if repeats.run:
                self.saw(repeats.run, repeats.continuation(1) == [token])
            repeats.append(token)

    def enter(self, proposed: int, accepted: int, seconds: float | None = None) -> None:
        """Book a pass that decided accepted + 1 tokens; seconds: how long it took, when that was measured."""
        gained = LOSS * (accepted + 1) + accepted
        if proposed:
            gained -= self._spent(proposed, seconds)
        else:
            # Nothing is measured while nothing is proposed: what was dear once is tried again, in time.
            self.cost = min(self.cost, max(self.usual, self.cost * FORGIVING))
            if seconds is not None:
                self._plain.append(seconds)
        self.balance = min(self.balance + gained, MOST_CREDIT)

    def _spent(self, proposed: int, seconds: float | None) -> float:
        if seconds is None or len(self._plain) < 3:
            return self.cost * proposed
        # A machine that stalls is not the proposal's doing: k tokens more never take longer than k passes and one.
        extra = min(max(seconds / median(self._plain) - 1, 0.0), proposed + 1.0)
        self._wide.append((proposed, extra))
        tokens, passes = map(sum, zip(*self._wide, strict=True))
        self.cost = max(LEAST_COST, passes / tokens)
        return extra


class ModelGain(Gain):
    """The same of what a smaller model proposes, which is asked again in time where it did not pay.

    settings: whose num_assistant_tokens are the most that it is asked for; two more after a draft that was right to the
    end and one less after one that was not, unless their schedule is constant. cost: with the model's own pass. chance:
    how often a token is expected to be right at first.
    """

    def __init__(self, cost: float, settings: GenerationConfig, chance: float = CHANCES[-1]):
        super().__init__(cost)
        self.balance = MOST_CREDIT
        self.chances[_kind(AS_LIKELY)] = [chance * PRIOR, PRIOR]
        self.most = settings.num_assistant_tokens
        self.fixed = settings.num_assistant_tokens_schedule == "constant"
        self.idle = 0  # passes since it was asked

    def wanted(self, limit: int) -> int:
        """How many tokens to ask the model for now, at most `limit`."""
        again = self.idle >= TRIED_AGAIN and limit > 0 and self.balance > self.cost
        return self.count(AS_LIKELY, min(self.most, limit)) or int(again)

    def enter(self, proposed: int, accepted: int, seconds: float | None = None) -> None:
        super().enter(proposed, accepted, seconds)
        self.idle = 0 if proposed else self.idle + 1
        for i in range(min(proposed, accepted + 1)):
            self.saw(AS_LIKELY, i < accepted)
        if not self.fixed and proposed:
            self.most = self.most + 2 if accepted == proposed else max(1, self.most - 1)


def check_assistant(assistant: Any, model: CausalLM) -> None:
    """Raises InputError for what cannot draft for this model."""
    if not isinstance(getattr(assistant, "generation_config", None), GenerationConfig):
        raise InputError(
            f"assistant_model is a {type(assistant).__module__}.{type(assistant).__name__}; it must be a gemmakit "
            "causal language model: load the draft with gemmakit.AutoModelForCausalLM."
        )
    ours, theirs = model.config.vocab_size, assistant.config.vocab_size
    if ours != theirs:
        raise InputError(
            f"assistant_model has a vocabulary of {theirs} ids and this model one of {ours}: a draft must be written "
            "in the same tokens."
        )


def bytes_share(assistant: Any, model: Any) -> float:
    """What a pass over one token of the assistant costs, in passes of the model: its bytes over the model's."""
    ours, theirs = (sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (model, assistant))
    return max(1, theirs) / max(1, ours)


def _kind(run: int) -> int:
    """Runs of 1, 2 or 3, 4 to 7, 8 to 15, and more are counted apart."""
    return min(run.bit_length(), len(CHANCES)) - 1


class Rewound:
    """Noise that is drawn for each token of a pass, and then as if it had been drawn for those alone that came."""

    def __init__(self, noise: Exponential):
        self._noise = noise
        self._states: list[Tensor] = []
        self._row: Tensor | None = None

    def __call__(self, like: Float[Tensor, "k V"]) -> Float[Tensor, "k V"]:
        self._states.clear()
        if len(like) == 1:
            return self._noise(like)
        self._row = like[:1]
        drawn: list[Tensor] = []
        for row in like.split(1):
            self._states.append(self._noise.state(row))
            drawn.append(self._noise(row))
        return torch.cat(drawn)

    def keep(self, count: int) -> None:
        """Let the first so many draws count."""
        if self._row is not None and count < len(self._states):
            self._noise.restore(self._states[count], self._row)
