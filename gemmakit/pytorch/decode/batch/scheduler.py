"""Who runs next in a batch whose rows come and go: pure data, with no tensors, no clock, no threads, no I/O.

A sequence waits, runs, and leaves. Each step runs the pending tokens of the running sequences: the one token that was
picked last, or a part of a prompt. First come, first served: a sequence is never overtaken by a later one, neither in
entering nor in being sent back. Source: arXiv:2309.06180 (pages, preemption by recomputing), arXiv:2403.02310 (prompts
in parts beside running rows).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from gemmakit.errors import InputError, PromptTooLong
from gemmakit.pytorch.cache.pages import Holding, PagePool, Prefix


@dataclass(eq=False)
class Sequence:
    """One request as the scheduler sees it.

    tokens: the prompt and what has come since. limit: tokens there may be at most. computed: how many of the tokens
    have their keys in the pages of `holding`. salt: prefixes are shared within one only. whole: run all of the prompt,
    whatever is known of it. like: another of the same prompt; while that one runs it, this one waits for its pages.
    cached: how many tokens of the prompt were found computed when it first ran; None before.
    """

    id: int
    tokens: list[int]
    limit: int
    computed: int = 0
    salt: str = ""
    whole: bool = False
    like: Sequence | None = field(default=None, repr=False)
    holding: Holding = field(default_factory=Holding)
    cached: int | None = None
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens to run before the next one can be picked; at least 1."""
        return len(self.tokens) - self.computed

    @property
    def runs_prompt(self) -> bool:
        """Whether it is running its prompt, which others may then share."""
        return bool(self.holding.pages) and len(self.tokens) == self.prompt_length

    @property
    def full(self) -> bool:
        return len(self.tokens) >= self.limit


@dataclass(frozen=True)
class Part:
    """Tokens start..end of a sequence, to be run in one pass; `last` if its next token can be picked then.

    draft: tokens that are proposed to follow the sequence's own; the part ends with them.
    """

    sequence: Sequence
    start: int
    end: int
    last: bool
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.end], *self.draft]

    @property
    def deciding(self) -> list[Part]:
        """The parts, without a draft, whose next tokens can be picked: this one and each that ends within its draft."""
        own = self.end - len(self.draft)
        return [Part(self.sequence, self.start, end, True) for end in range(own, self.end + 1)] if self.last else []


@dataclass(frozen=True)
class Step:
    """What to run: parts of several tokens, and of one."""

    prefill: tuple[Part, ...]
    decode: tuple[Part, ...]


class Scheduler:
    """Decides from counts alone; what the tokens are matters to shared prefixes only.

    The order of calls is `plan`, run, then `advance` for each part that ran, or `remove`. A plan that was not run has
    handed out pages and moved sequences, and no more: plan again. Between run and advance, `ahead` may give one step
    more to run, so that a device need not wait for the host.

    Args:
        pool: the pages.
        max_batch_size: sequences that run at a time.
        prefill_tokens: prompt tokens a step, so that a long prompt does not keep the running rows waiting.
    """

    def __init__(self, pool: PagePool, max_batch_size: int, prefill_tokens: int):
        self.pool, self.max_batch_size, self.prefill_tokens = pool, max_batch_size, prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = self.prefix_queries = self.prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, prompt: int, new: int) -> None:
        """Raises PromptTooLong if a request could not even run alone. The last token is never run: it needs no room."""
        room = self.pool.pages * self.pool.page_size
        if prompt + new - 1 > room:
            fewer = f", ask for at most {room + 1 - prompt} new tokens" if prompt <= room else ""
            raise PromptTooLong(
                f"prompt has {prompt} tokens and may get {new} new ones, but the paged cache holds {room}. "
                f"Shorten the prompt{fewer}, or pass cache_tokens={prompt + new}."
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises PromptTooLong as `check` does, InputError without a token or room for a new one."""
        prompt = len(sequence.tokens)
        if not prompt or sequence.limit <= prompt:
            raise InputError(f"a sequence of {prompt} tokens with a limit of {sequence.limit} has nothing to run.")
        self.check(prompt, sequence.limit - prompt)
        self.waiting.append(sequence)

    def plan(self) -> Step:
        """The next step. Sequences that find no page go back to waiting, the youngest first."""
        budget = self.prefill_tokens
        parts: list[Part] = []
        for sequence in list(self.running):
            if sequence in self.running and self._make_room(sequence):
                budget -= self._part(sequence, budget, parts)
        while self.waiting and budget > 0 and len(self.running) < self.max_batch_size and self._admit():
            budget -= self._part(self.running[-1], budget, parts)
        alone = tuple(part for part in parts if part.end - part.start > 1)
        together = tuple(part for part in parts if part.end - part.start == 1)
        return Step(alone, together)

    def ahead(self, under_way: Iterable[Part]) -> Step | None:
        """The step after one whose tokens are not known yet, before `advance`; None where it takes knowing them.

        Only counts decide it: a sequence whose last possible token is under way is left out, one that turns out to have
        ended runs a token in vain. Nobody enters or is sent back.
        """
        parts = {part.sequence.id: part for part in under_way}
        if self.waiting and len(self.running) < self.max_batch_size:
            return None
        out: list[Part] = []
        for sequence in self.running:
            part = parts.get(sequence.id)
            if part is None or not part.last:
                return None
            if part.end + 1 >= sequence.limit:
                continue
            if not self.pool.grow(sequence.holding, self.pool.needed(part.end + 1)):
                return None
            out.append(Part(sequence, part.end, part.end + 1, True))
        return Step((), tuple(out)) if out else None

    def advance(self, part: Part, token: int | None = None) -> None:
        """A part has run; and, if it was the last one, `token` was picked from finite scores.

        So whatever the pages hold up to there is sound, and may be shared from now on.
        """
        sequence = part.sequence
        if token is not None:
            self.pool.remember(sequence.holding, sequence.tokens)
            sequence.tokens.append(token)
        sequence.computed = part.end

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its pages are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence.holding)

    def _part(self, sequence: Sequence, budget: int, parts: list[Part]) -> int:
        """Add what a sequence runs in this step; how much of the prompt budget that takes."""
        count = min(sequence.pending, max(budget, 1 if sequence.pending == 1 else 0))
        if count:
            last = count == sequence.pending
            parts.append(Part(sequence, sequence.computed, sequence.computed + count, last))
        return count if sequence.pending > 1 else 0

    def _admit(self) -> bool:
        """Let the first of the waiting run, if there are pages for its tokens and the next one."""
        sequence = self.waiting[0]
        if self.pool.share and sequence.like is not None and sequence.like.runs_prompt:
            return False
        prefix = Prefix((), sequence.salt) if sequence.whole else self.pool.find(sequence.tokens, sequence.salt)
        # The last token is never run. A page for the next one spares a sequence being sent back at its first step.
        stored = min(len(sequence.tokens) + 1, sequence.limit - 1)
        holding = self.pool.hold(self.pool.needed(stored), prefix)
        if holding is None:
            return False
        self.waiting.popleft()
        sequence.holding = holding
        sequence.computed = len(prefix.pages) * self.pool.page_size
        if sequence.cached is None:
            sequence.cached = sequence.computed
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed
        self.running.append(sequence)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Pages for all tokens of a running sequence; False if it had to go back to waiting itself."""
        while not self.pool.grow(sequence.holding, self.pool.needed(len(sequence.tokens))):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting with its tokens kept; its keys are computed again, unless its pages are still known."""
        self.running.remove(sequence)
        self.pool.release(sequence.holding)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1
