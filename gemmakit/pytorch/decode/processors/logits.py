"""What changes a step's logits: small frozen values, called with what is there so far.

Every processor takes ids (B, n), prompt and new tokens, and float32 scores (B, V), and gives scores of the same shape;
a forbidden token has -inf. What a step does follows from ids and scores alone (what some remember only saves work), so
beams may change places and drafts be taken back. Each is named for the setting that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import InputError, TokenOutOfRange

FORBIDDEN = float("-inf")
# Stands where padding is: no token has this id, so nothing is ever found there.
NOTHING = -1


class ScoresOnly:
    """Marks processors that read a row's scores and nothing else, are equal if they do the same, and run on the device
    without the host: they can be recorded with a step, and rows of a batch share them."""


def seen(ids: Tensor, padding: Tensor | None) -> Tensor:
    """ids (B, n) with NOTHING in place of the prompt's padding, bool (R, P), a row a prompt or one a row of ids."""
    if padding is None:
        return ids
    padding, width = rows_of(padding, ids.shape[0]), padding.shape[1]
    return torch.cat((ids[:, :width].masked_fill(padding, NOTHING), ids[:, width:]), dim=1)


def presence(ids: Tensor, vocabulary: int) -> Tensor:
    """bool (B, V): which tokens are among ids (B, n); NOTHING is none of them."""
    found = torch.zeros((ids.shape[0], vocabulary + 1), dtype=torch.bool, device=ids.device)
    return found.scatter_(1, torch.where(ids < 0, vocabulary, ids), True)[:, :vocabulary]


def rows_of(prompt: Tensor, rows: int) -> Tensor:
    """(R, ...) for the rows of a search, repeated from one a prompt where there are several beams."""
    return prompt if prompt.shape[0] == rows else prompt.repeat_interleave(rows // prompt.shape[0], dim=0)


def penalized(scores: Tensor, penalty: float, where: Tensor) -> Tensor:
    """Scores divided by the penalty if positive, multiplied if not, `where` (B, V) is True."""
    return torch.where(where, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


# -- forbid tokens, or leave only some, in every strategy --------------------------------------------------------------

# (row of the batch, its ids so far (n,)) -> the ids that may come next
AllowedTokens = Callable[[int, Tensor], Sequence[int]]


@dataclass(frozen=True)
class MinLength:
    """No eos before `length` tokens, prompt included."""

    length: int
    eos: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, self.eos, FORBIDDEN) if ids.shape[1] < self.length else scores


@dataclass(frozen=True)
class ForcedTokens:
    """When there are `length` tokens, one of `tokens` comes next, whatever the model says."""

    length: int
    tokens: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != self.length:
            return scores
        return torch.full_like(scores, FORBIDDEN).index_fill(1, self.tokens, 0.0)


@dataclass(frozen=True)
class SuppressTokens:
    """`tokens` never come; or, with `length`, not when there are that many tokens."""

    tokens: Tensor
    length: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.length is not None and ids.shape[1] != self.length:
            return scores
        return scores.index_fill(1, self.tokens, FORBIDDEN)


@dataclass(frozen=True)
class RemoveInvalidValues(ScoresOnly):
    """NaN becomes 0 and the infinities the largest and smallest finite number."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.nan_to_num(nan=0.0)


@dataclass(frozen=True)
class PrefixAllowedTokens:
    """Only what `allowed` names may come next. Source: arXiv:2010.00904.

    rows: rows of the batch that belong to one prompt (its beams); `allowed` is told the prompt's number. It runs on the
    host, so every step waits for the device.
    """

    allowed: AllowedTokens
    rows: int

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        may = torch.zeros_like(scores, dtype=torch.bool)
        for row in range(ids.shape[0]):
            may[row, self._ids(row, ids, scores.shape[-1])] = True
        kept = scores.masked_fill(~may, FORBIDDEN)
        # Where other processors forbid everything this allows, for all beams of a prompt, this one decides alone.
        stuck = kept.amax(-1).isneginf().view(-1, self.rows).all(-1).repeat_interleave(self.rows)
        alone = torch.zeros_like(scores).masked_fill(~may, FORBIDDEN)
        return torch.where(stuck[:, None], alone, kept)

    def _ids(self, row: int, ids: Tensor, vocabulary: int) -> Tensor:
        prompt = row // self.rows
        tokens: Any = self.allowed(prompt, ids[row])
        tokens = torch.as_tensor(tokens, dtype=torch.long, device=ids.device)
        if not len(tokens):
            raise InputError(
                f"prefix_allowed_tokens_fn gave no token for prompt {prompt} after {ids.shape[1]} tokens: it must "
                "allow at least one, for instance eos."
            )
        if not bool(((tokens >= 0) & (tokens < vocabulary)).all()):
            wrong = next(t for t in tokens.tolist() if not 0 <= t < vocabulary)
            raise TokenOutOfRange(
                f"prefix_allowed_tokens_fn gave the token id {wrong}, which is outside the vocabulary of "
                f"{vocabulary} ids."
            )
        return tokens


# -- make tokens likelier or less likely by what is there already, in every strategy -----------------------------------


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of tokens that are there already are divided (if positive) or multiplied by the penalty.

    Source: arXiv:1909.05858, section 4.1. Padding counts as absent.
    """

    penalty: float
    padding: Tensor | None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return penalized(scores, self.penalty, presence(seen(ids, self.padding), scores.shape[-1]))


@dataclass(frozen=True)
class EncoderRepetitionPenalty:
    """The inverse penalty for the prompt's own tokens: above 1 it keeps the text close to them.

    prompt: (R, P) with NOTHING on padding. The name it has in GenerationConfig, encoder_repetition_penalty, is older
    than decoder-only models.
    """

    penalty: float
    prompt: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        there = presence(self.prompt, scores.shape[-1])
        return penalized(scores, 1 / self.penalty, rows_of(there, scores.shape[0]))


@dataclass(frozen=True)
class NoRepeatNgram:
    """Forbids each token that would complete an n-gram a second time. Source: arXiv:1705.04304, section 2.5."""

    size: int
    padding: Tensor | None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        ids = seen(ids, self.padding)
        return _without_completions(ids, ids, self.size, scores)


@dataclass(frozen=True)
class EncoderNoRepeatNgram:
    """Forbids each token that would complete an n-gram of the prompt (R, P), NOTHING on padding."""

    size: int
    prompt: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return _without_completions(rows_of(self.prompt, ids.shape[0]), ids, self.size, scores)


def _without_completions(text: Tensor, ids: Tensor, size: int, scores: Tensor) -> Tensor:
    """Forbid what follows, anywhere in text (B, m), the last size - 1 tokens of ids (B, n)."""
    if text.shape[1] < size or ids.shape[1] < size - 1:
        return scores
    grams = text.unfold(1, size, 1)  # (B, m - size + 1, size)
    ending = ids[:, ids.shape[1] - (size - 1) :]
    matches = (grams[..., :-1] == ending[:, None]).all(-1)
    completions = torch.where(matches, grams[..., -1], -1)
    return scores.masked_fill(presence(completions, scores.shape[-1]), FORBIDDEN)


@dataclass(frozen=True)
class SequenceBias:
    """Adds to the logit of a sequence's last token wherever the tokens before it are there.

    single: (V,) for sequences of one token. longer: a group a length, of beginnings (G, m), last tokens (G,) and
    biases (G,).
    """

    single: Tensor
    longer: Sequence[tuple[Tensor, Tensor, Tensor]]
    padding: Tensor | None

    @classmethod
    def of(
        cls, biases: Mapping[tuple[int, ...], float], vocabulary: int, padding: Tensor | None, device: torch.device
    ) -> SequenceBias:
        single = torch.zeros(vocabulary, dtype=torch.float32, device=device)
        by_length: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for ids, bias in biases.items():
            if len(ids) == 1:
                single[ids[0]] = bias
            else:
                by_length.setdefault(len(ids), []).append((ids, bias))
        longer = [_group(group, device) for group in by_length.values()]
        return cls(single, longer, padding)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        ids = seen(ids, self.padding)
        bias = self.single.expand_as(scores).clone()
        for beginnings, last, amounts in self.longer:
            length = beginnings.shape[1]
            if length > ids.shape[1]:
                continue
            matches = (ids[:, None, -length:] == beginnings).all(-1)
            bias.index_add_(1, last, torch.where(matches, amounts, 0.0))
        return scores + bias


def _group(group: Sequence[tuple[tuple[int, ...], float]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    beginnings = torch.tensor([ids[:-1] for ids, _ in group], device=device)
    last = torch.tensor([ids[-1] for ids, _ in group], device=device)
    return beginnings, last, torch.tensor([bias for _, bias in group], dtype=torch.float32, device=device)


def bad_words(words: Sequence[Sequence[int]], eos: Sequence[int]) -> dict[tuple[int, ...], float]:
    """The biases that forbid these sequences; a lone eos stays allowed, or nothing could end."""
    return {tuple(word): FORBIDDEN for word in words if not (len(word) == 1 and word[0] in eos)}


@dataclass(frozen=True)
class ExponentialDecayLengthPenalty:
    """After `start` tokens, prompt included, eos gains |logit| * (factor ** further tokens - 1)."""

    start: int
    factor: float
    eos: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        further = ids.shape[1] - self.start
        if further <= 0:
            return scores
        logits = scores[:, self.eos]
        gain = (logits.abs() * (self.factor**further - 1)).masked_fill(~logits.isfinite(), 0.0)
        return scores.index_copy(1, self.eos, logits + gain)


# -- shape the distribution to sample from; each leaves at least `keep` tokens a row -----------------------------------


@dataclass(frozen=True)
class Temperature(ScoresOnly):
    """Logits divided by the temperature: below 1 sharper, above 1 flatter."""

    temperature: float

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


@dataclass(frozen=True)
class TopK(ScoresOnly):
    """Keep the k largest logits; those equal to the k-th stay too."""

    k: int
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(scores < _largest(scores, max(self.k, self.keep)), FORBIDDEN)


# A CPU takes longer to sort a whole vocabulary than to run a layer, and the set rarely has more tokens than this.
_HEAD = 1024


@dataclass(frozen=True)
class TopP(ScoresOnly):
    """Keep the smallest set of likeliest tokens whose probability reaches p. Source: arXiv:1904.09751."""

    p: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if scores.device.type != "cpu" or scores.shape[-1] <= 4 * _HEAD:
            return self._of_all(scores)
        kept, reached = self._of_head(scores)
        if not bool(reached.all()):  # row by row: which way one goes must not depend on the others
            kept[~reached] = self._of_all(scores[~reached])
        return kept

    def _of_all(self, scores: Tensor) -> Tensor:
        ascending, order = scores.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - self.p
        drop[:, -self.keep :] = False
        return scores.masked_fill(drop.scatter(1, order, drop), FORBIDDEN)

    def _of_head(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the likeliest tokens alone, and in which rows (bool, (R,)) they reach p."""
        best, order = scores.topk(_HEAD)
        probabilities = scores.softmax(-1).gather(-1, order)
        likelier = probabilities.cumsum(-1) - probabilities  # the probability of the tokens before each
        drop = likelier >= self.p
        drop[:, : self.keep] = False
        kept = torch.full_like(scores, FORBIDDEN).scatter(1, order, best.masked_fill(drop, FORBIDDEN))
        return kept, likelier[:, -1] >= self.p


@dataclass(frozen=True)
class MinP(ScoresOnly):
    """Drop tokens with less than `share` of the likeliest token's probability. Source: arXiv:2407.01082."""

    share: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        drop = probabilities < self.share * probabilities.amax(-1, keepdim=True)
        if self.keep > 1:  # the likeliest one is never dropped
            drop = drop.scatter(1, probabilities.topk(min(self.keep, scores.shape[-1])).indices, False)
        return scores.masked_fill(drop, FORBIDDEN)


# Tokens the entropy of TopH is computed over; the rest of a peaked distribution adds little.
_CANDIDATES = 100


@dataclass(frozen=True)
class TopH(ScoresOnly):
    """Keep likeliest tokens while their part of the entropy is at most `share` of it. Source: arXiv:2509.02510."""

    share: float

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        best, index = scores.topk(min(_CANDIDATES, scores.shape[-1]))
        keep = _entropies(best).cumsum(-1) <= self.share * total(_entropies(best))
        keep[:, 0] = True
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).scatter(1, index, ~keep), FORBIDDEN)


@dataclass(frozen=True)
class TypicalP(ScoresOnly):
    """Keep the tokens whose surprise is nearest to the entropy, up to probability p. Source: arXiv:2202.00666."""

    p: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        logs = scores.log_softmax(-1)
        entropy = -total((logs * logs.exp()).nan_to_num(0.0))
        distance, order = (-logs - entropy).abs().sort(dim=-1)
        covered = scores.gather(-1, order).softmax(-1).cumsum(-1)
        last = (covered < self.p).sum(-1, keepdim=True).clamp_max(scores.shape[-1] - 1)
        drop = distance > distance.gather(-1, last)
        drop[:, : self.keep] = False
        return scores.masked_fill(drop.scatter(1, order, drop), FORBIDDEN)


@dataclass(frozen=True)
class EpsilonCutoff(ScoresOnly):
    """Drop tokens less likely than the floor. Source: arXiv:2210.15191, section 4.1."""

    floor: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return _above(self.floor, scores, self.keep)


@dataclass(frozen=True)
class EtaCutoff(ScoresOnly):
    """As EpsilonCutoff, with a floor that sinks as the entropy grows. Source: arXiv:2210.15191, section 4.2."""

    floor: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        expected = self.floor**0.5 * (-total(_entropies(scores))).exp()
        return _above(expected.clamp_max(self.floor), scores, self.keep)


@dataclass(frozen=True)
class RenormalizeLogits(ScoresOnly):
    """Scores become log probabilities."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)


def total(x: Tensor) -> Tensor:
    """The sum of each row, (B, 1), in an order that neither the rows beside it nor the threads change."""
    return x.cumsum(-1)[:, -1:]


def _above(floor: float | Tensor, scores: Tensor, keep: int) -> Tensor:
    drop = (scores.softmax(-1) < floor) & (scores < _largest(scores, keep))
    return scores.masked_fill(drop, FORBIDDEN)


def _largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest score of each row, (B, 1)."""
    return scores.topk(min(k, scores.shape[-1])).values[:, -1:]


def _entropies(scores: Tensor) -> Tensor:
    """Each token's part of the entropy, -p ln p; 0 for a forbidden one."""
    return torch.special.entr(scores.softmax(-1))
