"""Prompt lookup: what followed the last tokens the last time they came is proposed to follow again.

It changes no token: greedy or sampled with a seed, the row is the one that decoding token by token gives. What a
proposal costs is the wider pass that checks it, and a ledger keeps that below 5 % of the time, however bad the
proposals are. Axis letters: k proposed tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import Noise, greedy, sampler
from gemmakit.pytorch.decode.step import Plan
from gemmakit.pytorch.decode.strategies.assisted import Proposal, agreement, one_row, speculate
from gemmakit.pytorch.decode.stream import Steps

DEFAULT_NGRAM = 2
# Share of the time that fruitless proposals may take; with the bookkeeping it stays under 5 %.
LOSS = 0.03
# What a proposed token adds to a pass, as a share of a pass over one token, until it has been measured here.
WIDTH_COST = {"cuda": 0.02, "cpu": 0.25}
REMEMBERED = 15


class Ngrams:
    """Where each run of up to `longest` tokens came last, so that what followed it can be found at once."""

    def __init__(self, longest: int):
        self.longest = longest
        self.tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # run -> place after it

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self.tokens)
            for size in range(1, min(self.longest, end) + 1):
                self._followed[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """What may follow, by the longest run known; a run that overlaps its own repetition goes round."""
        for size in range(min(self.longest, len(self.tokens)), 0, -1):
            place = self._followed.get(tuple(self.tokens[-size:]))
            if place is not None:
                period = len(self.tokens) - place
                return [self.tokens[place + i % period] for i in range(count)]
        return []


class Ledger:
    """How many tokens may be proposed, so that even if none of them is right no more than LOSS of the time is lost.

    In units of a pass over one token: n tokens one by one take n. A pass that checks proposals takes more, as measured
    against this call's own plain passes, and saves one for each accepted token. What the proposals have cost beyond
    what they saved may reach LOSS * n; what is left of that, over the mean cost of a proposed token, may be proposed.
    """

    def __init__(self, device: torch.device):
        self.cost = WIDTH_COST.get(device.type, WIDTH_COST["cpu"])
        self.balance = 0.0
        self._plain: deque[float] = deque(maxlen=REMEMBERED)
        self._wide: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def affordable(self) -> int:
        return max(0, int(self.balance / self.cost))

    def enter(self, proposed: int, accepted: int, seconds: float | None = None) -> None:
        """Book a pass that decided accepted + 1 tokens; seconds: how long it took, when that was measured."""
        self.balance += LOSS * (accepted + 1) + accepted
        if proposed:
            self.balance -= self._spent(proposed, seconds)
        elif seconds is not None:
            self._plain.append(seconds)

    def _spent(self, proposed: int, seconds: float | None) -> float:
        if seconds is None or len(self._plain) < 3:
            return self.cost * proposed
        # A machine that stalls is not the proposal's doing: k tokens more never take longer than k passes and one.
        extra = min(max(seconds / median(self._plain) - 1, 0.0), proposed + 1.0)
        self._wide.append((proposed, extra))
        tokens, passes = map(sum, zip(*self._wide, strict=True))
        self.cost = max(0.005, passes / tokens)
        return extra


class HeldNoise:
    """Noise for the tokens to come: what a round has drawn for tokens it did not reach serves the next one.

    So token i is always drawn with the i-th noise, as when no tokens are proposed.
    """

    def __init__(self, noise: Noise):
        self._noise = noise
        self._held: list[Tensor] = []

    def __call__(self, like: Tensor) -> Tensor:
        while len(self._held) < len(like):
            self._held.append(self._noise(like[:1]))
        return torch.cat(self._held[: len(like)])

    def drop(self, count: int) -> None:
        del self._held[:count]


class Lookup:
    """Drafts from the text so far."""

    processed = False

    def __init__(self, prompt: Prompt, plan: Plan):
        config = plan.config
        self.count = config.prompt_lookup_num_tokens or 0
        self.eos = config.eos_token_ids
        self.ngrams = Ngrams(config.max_matching_ngram_size or DEFAULT_NGRAM)
        ids = prompt.ids[0] if prompt.padding is None else prompt.ids[0][~prompt.padding[0]]
        self.ngrams.extend(ids.tolist())
        self.ledger = Ledger(prompt.ids.device)
        self.noise = HeldNoise(plan.noise) if config.do_sample else None
        self.pick = greedy if self.noise is None else sampler(self.noise)

    def propose(self, ids: Tensor, new: Sequence[int], limit: int) -> Proposal | None:
        self.ngrams.extend(new)
        if self.noise is not None:
            self.noise.drop(len(new))
        tokens = self.ngrams.continuation(min(self.count, limit, self.ledger.affordable()))
        if not tokens:
            return None
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos), len(tokens))
        return Proposal(torch.tensor(tokens[:end], dtype=torch.long, device=ids.device))

    def check(self, scores: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
        return agreement(self.pick(scores), proposal)

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        self.ledger.enter(proposed, accepted, seconds)


def prompt_lookup_decoding(model: CausalLM, prompt: Prompt, plan: Plan) -> Steps[GenerateDecoderOnlyOutput]:
    """The text so far proposes, the model checks."""
    one_row(prompt)
    drafter = Lookup(prompt, plan)
    return speculate(model, prompt, replace(plan, pick=drafter.pick), drafter)
