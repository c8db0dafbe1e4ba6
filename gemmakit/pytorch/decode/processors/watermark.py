"""Marking a text while it is sampled, and finding the mark later. Green lists (Kirchenbauer) and SynthID-text.

Sources: arXiv:2301.10226, arXiv:2306.04634; doi:10.1038/s41586-024-08025-4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import BaseWatermarkingConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig
from gemmakit.generation.watermarks import watermark_of
from gemmakit.pytorch.decode.processors.logits import seen, total
from gemmakit.pytorch.decode.protocols import Processor

# Candidates that "selfhash" tries a step: trying the whole vocabulary would take minutes.
_SELFHASH_CANDIDATES = 40
_TABLE = 1000003
_LISTS_KEPT = 512


def processor(
    settings: BaseWatermarkingConfig, vocabulary: int, prompt_length: int, padding: Tensor | None = None
) -> Processor:
    """The processor that these settings ask for. padding: bool (B, P), True where the prompt is padding."""
    if isinstance(settings, SynthIDTextWatermarkingConfig):
        return SynthID(settings, prompt_length)
    assert isinstance(settings, WatermarkingConfig)
    return GreenList(settings, vocabulary, padding)


class GreenLists:
    """Which tokens are green after which tokens.

    The lists come from torch's generator of the CPU whatever the model runs on, so a text can be checked anywhere.
    """

    def __init__(self, settings: WatermarkingConfig, vocabulary: int):
        self.settings, self.vocabulary = settings, vocabulary
        self.size = int(vocabulary * settings.greenlist_ratio)
        self._table = _shuffled(_TABLE, settings.hashing_key)
        self.of_seed = lru_cache(_LISTS_KEPT)(self._of_seed)

    def seeds(self, contexts: Tensor) -> list[int]:
        """contexts: (..., w) ids on the CPU -> the seed of each, flat."""
        if self.settings.seeding_scheme == "lefthash":
            return [self.settings.hashing_key * last for last in contexts[..., -1].flatten().tolist()]
        hashed = self._table[contexts[..., -self.settings.context_width :] % _TABLE] + 1
        # int64 overflows here, as it does in the published generators and detectors.
        return (self.settings.hashing_key * hashed * hashed[..., -1:]).amin(-1).flatten().tolist()

    def _of_seed(self, seed: int) -> Tensor:
        """bool (V,), True for green."""
        green = torch.zeros(self.vocabulary, dtype=torch.bool, device="cpu")
        green[_shuffled(self.vocabulary, seed % (2**64 - 1))[: self.size]] = True
        return green


def _shuffled(count: int, seed: int) -> Tensor:
    """The numbers below `count` in the CPU's order for this seed, whatever the caller's default device."""
    return torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


@dataclass(frozen=True)
class GreenList:
    """Adds the bias to green tokens. Which are green depends on tokens, so every step waits for the device."""

    settings: WatermarkingConfig
    vocabulary: int
    padding: Tensor | None = None
    lists: GreenLists = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lists", GreenLists(self.settings, self.vocabulary))

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        width = self.settings.context_width
        if ids.shape[1] < width:
            return scores  # too early to know a context
        context = seen(ids, self.padding)[:, -width:].cpu()
        green = (
            self._by_itself(context, scores) if self.settings.seeding_scheme == "selfhash" else self._by_last(context)
        )
        green &= (context >= 0).all(-1, keepdim=True)  # a row too short for a context is left alone
        return torch.where(green.to(scores.device), scores + self.settings.bias, scores)

    def _by_last(self, context: Tensor) -> Tensor:
        return torch.stack([self.lists.of_seed(seed) for seed in self.lists.seeds(context)])

    def _by_itself(self, context: Tensor, scores: Tensor) -> Tensor:
        """Only the likeliest tokens are tried: each is green if it is in the list that it seeds itself."""
        B, V = scores.shape
        likely = scores.topk(min(_SELFHASH_CANDIDATES, V)).indices.cpu()
        tried = torch.cat((context[:, None].expand(-1, likely.shape[1], -1), likely[..., None]), dim=-1)
        seeds = self.lists.seeds(tried)
        own = [bool(self.lists.of_seed(s)[t]) for s, t in zip(seeds, likely.flatten().tolist(), strict=True)]
        own = torch.tensor(own, device="cpu").view_as(likely)
        return torch.zeros(B, V, dtype=torch.bool, device="cpu").scatter(1, likely, own)


class Tournament:
    """SynthID's hashes: from n-grams to coin flips (g values), one a key."""

    # The multiplier and increment of a 64-bit linear congruential generator (Knuth's MMIX).
    _MULTIPLIER, _INCREMENT = 6364136223846793005, 1

    def __init__(self, settings: SynthIDTextWatermarkingConfig):
        self.settings = settings
        generator = torch.Generator("cpu").manual_seed(settings.sampling_table_seed)
        self._table = torch.randint(0, 2, (settings.sampling_table_size,), generator=generator, device="cpu").float()

    def hash(self, tokens: Tensor, start: Tensor | int = 1) -> Tensor:
        """tokens: (..., k) -> (...): their hash, continuing from `start`. int64 wraps around."""
        value = torch.as_tensor(start, device=tokens.device)
        for i in range(tokens.shape[-1]):
            value = (value + tokens[..., i]) * self._MULTIPLIER + self._INCREMENT
        return value

    def flips(self, ngrams: Tensor, key: int) -> Tensor:
        """ngrams: hashes (...) -> 0.0 or 1.0 (...) for this key."""
        if self._table.device != ngrams.device:
            self._table = self._table.to(ngrams.device)
        size = self._table.shape[0]
        hashed = (ngrams + key).mul_(self._MULTIPLIER).add_(self._INCREMENT)
        # The usual sizes are powers of two, for which the remainder is a mask.
        place = hashed.bitwise_and_(size - 1) if size & (size - 1) == 0 else hashed.remainder_(size)
        return torch.take(self._table, place)

    def fresh(self, contexts: Tensor) -> Tensor:
        """contexts: hashes (B, m) in order -> bool (B, m), False where one came before and is remembered."""
        m = contexts.shape[1]
        place = torch.arange(m, device=contexts.device)
        gap = place[:, None] - place
        remembered = (gap > 0) & (gap <= self.settings.context_history_size)
        return ~((contexts[:, :, None] == contexts[:, None]) & remembered).any(-1)


@dataclass(frozen=True)
class SynthID:
    """Tilts the distribution, key after key, towards tokens whose flip is 1, unless this context was marked before.

    On average over the keys the distribution is unchanged. A context is the new tokens alone, zeros before them.
    """

    settings: SynthIDTextWatermarkingConfig
    prompt_length: int
    tournament: Tournament = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tournament", Tournament(self.settings))

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.settings.debug_mode:
            scores = torch.ones_like(scores)
        width, new = self.settings.ngram_len - 1, ids.shape[1] - self.prompt_length
        first = width if self.settings.skip_first_ngram_calls else 0
        if new < first:
            return scores
        first = max(first, new - self.settings.context_history_size)
        padded = torch.nn.functional.pad(ids[:, self.prompt_length :], (width, 0))[:, first:]
        contexts = self.tournament.hash(padded.unfold(1, width, 1))  # (B, new - first + 1), the current one last
        repeated = (contexts[:, :-1] == contexts[:, -1:]).any(-1, keepdim=True)
        return torch.where(repeated, scores, self._tilted(scores, contexts[:, -1:]))

    def _tilted(self, scores: Tensor, context: Tensor) -> Tensor:
        vocabulary = torch.arange(scores.shape[-1], device=scores.device)
        ngrams = self.tournament.hash(vocabulary[None, :, None], context)
        probabilities = scores.softmax(-1)
        for key in self.settings.keys:
            flips = self.tournament.flips(ngrams, key)
            share = total(flips * probabilities)
            probabilities = probabilities * (1 + flips - share)
        return probabilities.log()


@dataclass
class WatermarkDetectorOutput:
    """What a detector found, a row each. All are NumPy arrays (B,).

    num_tokens_scored; num_green_tokens (for SynthID: flips of 1, averaged over the keys); green_fraction; z_score:
    standard deviations above what an unmarked text has; p_value: how likely an unmarked text is to have as many;
    prediction: z_score above the threshold; confidence: 1 - p_value.
    """

    num_tokens_scored: Any
    num_green_tokens: Any
    green_fraction: Any
    z_score: Any
    p_value: Any
    prediction: Any
    confidence: Any


class WatermarkDetector:
    """Says whether a text carries a watermark; needs the settings it was made with, and no model.

    model_config: for the vocabulary size and <bos>. device: kept for likeness with transformers; lists are the same on
    any. ignore_repeated_ngrams: count each n-gram once, which resists repetitive text. SynthID's keys are scored by
    their mean, the detector that needs no training.
    """

    def __init__(
        self,
        model_config: Any,
        device: Any = "cpu",
        watermarking_config: BaseWatermarkingConfig | dict[str, Any] | None = None,
        ignore_repeated_ngrams: bool = False,
        max_cache_size: int = 128,
    ):
        self.bos = model_config.bos_token_id
        self.settings = watermark_of(watermarking_config or WatermarkingConfig())
        self.ignore_repeated_ngrams = ignore_repeated_ngrams
        if isinstance(self.settings, SynthIDTextWatermarkingConfig):
            self._score = _SynthIDScore(self.settings)
        else:
            assert isinstance(self.settings, WatermarkingConfig)
            self._score = _GreenScore(GreenLists(self.settings, model_config.vocab_size))

    def __call__(self, input_ids: Tensor, z_threshold: float = 3.0, return_dict: bool = False) -> Any:
        """input_ids: (B, n), best without the prompt -> bool (B,), or all of it with return_dict.

        Raises InputError when some rows begin with <bos> and others do not, or a row is too short to score.
        """
        ids = self._without_bos(torch.as_tensor(input_ids, device="cpu"))
        if ids.shape[1] < self._score.length:
            raise InputError(
                f"the text has {ids.shape[1]} tokens, and {self._score.length} are needed to score the first one."
            )
        scored, green, z = zip(*(self._row(row) for row in ids), strict=True)
        scored, green, z = (torch.tensor(x, dtype=torch.float64, device="cpu").numpy() for x in (scored, green, z))
        if not return_dict:
            return z > z_threshold
        p_value = 0.5 * torch.special.erfc(torch.from_numpy(z) / 2**0.5).numpy()
        return WatermarkDetectorOutput(scored, green, green / scored, z, p_value, z > z_threshold, 1 - p_value)

    def _without_bos(self, ids: Tensor) -> Tensor:
        begins = ids[:, 0] == self.bos
        if bool(begins.any()) != bool(begins.all()):
            raise InputError("some rows begin with <bos> and others do not: encode all of them the same way.")
        return ids[:, 1:] if bool(begins.all()) else ids

    def _row(self, ids: Tensor) -> tuple[float, float, float]:
        """ids: (n,) -> tokens scored, how many are green, z."""
        grams = ids.unfold(0, self._score.length, 1)
        share, variance = self._score.chance
        if self.ignore_repeated_ngrams:
            grams = torch.unique(grams, dim=0)
        green = self._score(grams, self.ignore_repeated_ngrams)
        n = green.numel()
        z = (float(green.sum()) - share * n) / (n * variance) ** 0.5 if n else 0.0
        return n, float(green.sum()), z


class _GreenScore:
    """Whether the last token of each n-gram is in the list of the tokens before (or of itself)."""

    def __init__(self, lists: GreenLists):
        self.lists = lists
        self.itself = lists.settings.seeding_scheme == "selfhash"
        self.length = lists.settings.context_width + (not self.itself)
        share = lists.settings.greenlist_ratio
        self.chance = share, share * (1 - share)

    def __call__(self, grams: Tensor, unique: bool) -> Tensor:
        seeds = self.lists.seeds(grams if self.itself else grams[:, :-1])
        last = grams[:, -1].tolist()
        found = [float(self.lists.of_seed(s)[t]) for s, t in zip(seeds, last, strict=True)]
        return torch.tensor(found, dtype=torch.float64, device="cpu")


class _SynthIDScore:
    """The mean of each n-gram's flips; n-grams whose context was seen before were not marked, and do not count."""

    def __init__(self, settings: SynthIDTextWatermarkingConfig):
        self.tournament = Tournament(settings)
        self.length = settings.ngram_len
        self.chance = 0.5, 0.25 / len(settings.keys)

    def __call__(self, grams: Tensor, unique: bool) -> Tensor:
        hashes = self.tournament.hash(grams)
        mean = torch.stack([self.tournament.flips(hashes, k) for k in self.tournament.settings.keys]).double().mean(0)
        contexts = self.tournament.hash(grams[:, :-1])
        return mean if unique else mean[self.tournament.fresh(contexts[None])[0]]
