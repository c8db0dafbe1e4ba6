"""One request of a batch: its prompt and settings, checked, and its answers at work. Axis letter: V vocabulary."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from gemmakit.checks import Real, Whole, check_fields, is_whole
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, PromptTooLong, TokenOutOfRange
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode import processors, stopping
from gemmakit.pytorch.decode.batch import scheduler
from gemmakit.pytorch.decode.batch.events import Event, PromptLogprob, Usage
from gemmakit.pytorch.decode.healing import heal
from gemmakit.pytorch.decode.prompt import prepare
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import row_generators
from gemmakit.pytorch.decode.step import Step
from gemmakit.pytorch.row_adapters import check_adapter
from gemmakit.streamers import AnswerText

if TYPE_CHECKING:
    from gemmakit.pytorch.decode.batch.drafts import Drafts

MAX_ANSWERS = 128
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """What one caller wants.

    prompt: token ids, a list or a tensor (P,) or (1, P); empty starts from <bos>. generation_config: instead of the
    model's own settings; settings: any of its fields, for this request; max_time counts from when it is added.
    tokenizer: for the text in events and for what is about text. Processors and criteria see this request alone, ids
    (1, n) and scores (1, V).

    n: answers; of a sampled request with a seed, answer i draws from (seed, i). best_of: answers that are made, of
    which the n with the highest mean log probability are told, when all have ended. logprobs: how many of the likeliest
    tokens are told beside each token, 0 to 20, from the softmax of the model's own logits; None tells none, not even
    the token's own. prompt_logprobs: the same for the prompt's tokens; with max_new_tokens=0 these are all there is.
    adapter: the name of one of those that `load_adapters` put around the model; None for the model's own weights.
    cache_salt: prefixes are shared among requests of one salt only, and of one adapter. deadline: seconds it may wait
    before it runs.
    """

    prompt: Sequence[int] | Tensor
    generation_config: GenerationConfig | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: stopping.Decoder | None = None
    logits_processor: Iterable[processors.Processor] = ()
    stopping_criteria: Iterable[stopping.Criterion] = ()
    n: Annotated[int, Whole(1, MAX_ANSWERS)] = 1
    best_of: Annotated[int | None, Whole(1, MAX_ANSWERS)] = None
    logprobs: Annotated[int | None, Whole(0, MAX_LOGPROBS)] = None
    prompt_logprobs: Annotated[int | None, Whole(0, MAX_LOGPROBS)] = None
    adapter: str | None = None
    cache_salt: str = ""
    deadline: Annotated[float | None, Real(0)] = None

    def check(self) -> None:
        """Raises InputError for a field out of range."""
        check_fields(self, InputError)
        if self.best_of is not None and self.best_of < self.n:
            raise InputError(f"best_of is {self.best_of}, but n is {self.n}: give a best_of of at least n.")
        for name in ("cache_salt", "adapter"):
            if not isinstance(value := getattr(self, name), str) and (name, value) != ("adapter", None):
                raise InputError(f"{name} is a {type(value).__name__}; it is a string.")

    @property
    def salt(self) -> str:
        """Under which prefixes are shared: another adapter's keys are other numbers."""
        return f"{self.adapter!r} {self.cache_salt}"


@dataclass(eq=False)
class Group:
    """The answers of a request of which the best are told, once all have ended."""

    wanted: int
    open: int
    ended: list[tuple[float, list[Event]]] = field(default_factory=list)

    def close(self, events: list[Event], mean: float) -> list[Event]:
        """Take an answer that has ended; what is told, once it is the last. mean: of its log probabilities."""
        self.ended.append((mean, events))
        self.open -= 1
        if self.open:
            return []
        best = sorted(self.ended, key=lambda pair: pair[0], reverse=True)[: self.wanted]
        return [replace(event, index=i) for i, (_, events) in enumerate(best) for event in events]


@dataclass(eq=False)
class Row:
    """One answer at work: its place in the schedule and everything its next token depends on.

    id, index: of its request, and which of the answers to it. step: with an eos for the host alone. ids: (1, limit),
    the tokens once more, on the device, for processors and criteria that read them; or None. added, started, spoke:
    when it was added, first ran, gave its first token, by the monotonic clock. prompt_logprobs: those found so far.
    silent: whether only these are wanted. group, held, total: with best_of, its answers, the events of this one, and
    the sum of its log probabilities. drafts: what it proposes to itself, once it does. read: what a model that proposes
    to it has read, and said. drawn: the generator's states before each draw of a step, where it may take some back.
    unseeded: whether torch's generator is still to seed this row's.
    """

    id: int
    index: int
    request: Request
    sequence: scheduler.Sequence
    step: Step
    generator: torch.Generator | None
    ids: Tensor | None
    text: AnswerText | None = None
    group: Group | None = None
    prompt_logprobs: list[PromptLogprob | None] | None = None
    silent: bool = False
    added: float = field(default_factory=time.monotonic)
    started: float | None = None
    spoke: float | None = None
    held: list[Event] = field(default_factory=list)
    total: float = 0.0
    drafts: Drafts | None = None
    read: scheduler.Sequence | None = None
    drawn: list[Tensor] = field(default_factory=list["Tensor"])
    unseeded: bool = False

    @property
    def prompt_length(self) -> int:
        return self.sequence.prompt_length

    @property
    def new_tokens(self) -> int:
        return 0 if self.silent else len(self.sequence.tokens) - self.prompt_length

    @property
    def logprobs(self) -> int | None:
        """How many of the likeliest tokens are looked up beside each token; None if not even its own is."""
        return 0 if self.request.logprobs is None and self.group is not None else self.request.logprobs

    @property
    def chain(self) -> tuple[processors.Processor, ...]:
        return tuple(self.step.processors)

    @property
    def by_scores(self) -> bool:
        return all(isinstance(processor, processors.ScoresOnly) for processor in self.step.processors)

    @property
    def reads_scores(self) -> bool:
        """Whether a step's scores or logits are looked at after its token was chosen."""
        return bool(self.step.criteria) or self.logprobs is not None

    @property
    def usage(self) -> Usage:
        now = time.monotonic()
        queued = (now if self.started is None else self.started) - self.added
        first = None if self.spoke is None else self.spoke - self.added
        cached = self.sequence.cached or 0
        return Usage(self.prompt_length, cached, self.new_tokens, queued, first, now - self.added)

    def seed(self) -> None:
        """Begin the row's own chance, unless its request has a seed; once nothing can refuse it any more.

        So what is refused changes no other's draws, and processes that never hear of it draw what the first does.
        """
        if self.generator is not None and self.unseeded:
            self.generator.manual_seed(int(torch.randint(2**63 - 1, ())))
            self.unseeded = False

    def propose(self, tokens: Sequence[int]) -> None:
        """Let processors read these after the row's own tokens."""
        if self.ids is not None:
            at = len(self.sequence.tokens)
            self.ids[0, at : at + len(tokens)] = torch.tensor(tokens, device=self.ids.device)

    def proposed(self, place: int) -> int:
        """The token that is proposed there."""
        assert self.ids is not None
        return int(self.ids[0, place])

    def keep(self, count: int) -> None:
        """Let the first so many draws of a step count."""
        if count < len(self.drawn) and self.generator is not None:
            self.generator.set_state(self.drawn[count])
        self.drawn.clear()

    def process(self, scores: Tensor, length: int) -> Tensor:
        """scores: (1, V) -> (1, V) after this request's processors, of what follows the first `length` tokens."""
        ids = _no_ids(scores) if self.ids is None else self.ids[:, :length]
        out = self.step.process(ids, scores)
        if out.shape != scores.shape:
            raise InputError(f"a logits processor gave {tuple(out.shape)} for scores {tuple(scores.shape)}.")
        return out.to(scores)

    def ends(self, token: int, scores: Tensor | None) -> tuple[str | None, str]:
        """Why the answer ends with `token`, "eos", "stop", "length" or None, and what becomes certain of its text.

        scores: (1, V), those it was picked from; only rows without criteria may have none.
        """
        count = len(self.sequence.tokens) + 1
        if self.ids is not None:
            self.ids[0, count - 1] = token
        reason = self.step.reason(token, None if self.ids is None else self.ids[:, :count], scores)
        reason = "length" if reason is None and count >= self.sequence.limit else reason
        if self.text is None:
            return reason, ""
        text = self.text.push(token, reason)
        return "stop" if self.text.stopped and reason in (None, "length") else reason, text

    def unscored(self, part: scheduler.Part) -> range:
        """The places in a part whose next tokens are the prompt's and still to be scored."""
        found = self.prompt_logprobs
        if found is None:
            return range(0)
        return range(max(part.start, len(found) - 1), min(part.end, self.prompt_length - 1))

    def told(self, event: Event) -> list[Event]:
        """What the caller is told of an event of this answer, now or, with best_of, when all of them have ended."""
        ended = event.finish_reason is not None
        event = replace(event, index=self.index, usage=self.usage if ended else None)
        if self.group is None:
            return [event]
        self.total += event.logprob or 0.0
        self.held.append(event if self.request.logprobs is not None else replace(event, logprob=None))
        if not ended:
            return []
        sound = event.error is None and event.finish_reason != "timeout"
        return self.group.close(self.held, self.total / max(1, self.new_tokens) if sound else -math.inf)


@torch.no_grad()
def prepare_rows(model: CausalLM, request: Request, number: int) -> list[Row]:
    """Check a request and make the rows of its answers, not yet numbered in the schedule.

    Raises InputError, GenerationConfigError, TokenOutOfRange; PromptTooLong if the context is too short.
    """
    request.check()
    if request.adapter is not None:
        check_adapter(model, request.adapter)
    silent = request.prompt_logprobs is not None and request.settings.get("max_new_tokens") == 0
    own = {**request.settings, "max_new_tokens": 1} if silent else request.settings
    config = (request.generation_config or model.generation_config).updated(**own)
    config.validate(model.config.vocab_size)
    refuse_unbatched(model.config, config)
    stopping.refuse_clocks(model, config, tuple(request.stopping_criteria))
    vocabulary = model.config.vocab_size
    # The engine's pages are the cache, whatever cache the settings name.
    given = _tensor(request.prompt, vocabulary)
    prompt, new = prepare(model, config.updated(use_cache=False), given, None, None, None)
    if config.token_healing:
        heal(model, prompt, request.tokenizer)
    if prompt.mask is not None:
        prompt = replace(prompt, ids=prompt.ids[prompt.mask][None], mask=None)
    total = prompt.ids.shape[1] + new
    _check_rope(model.config, total)
    context = processors.Context(
        config,
        prompt,
        total,
        vocabulary,
        custom=tuple(request.logits_processor),
        model=model,
        tokenizer=request.tokenizer,
    )
    criteria = stopping.build(config, request.tokenizer, tuple(request.stopping_criteria), vocabulary)
    count = request.best_of or request.n
    group = Group(request.n, count) if count > request.n else None
    generators = _generators(config, prompt.ids, count) if config.do_sample else [None] * count
    rows = [_row(request, number, i, context, criteria, generator) for i, generator in enumerate(generators)]
    for row in rows:
        row.group, row.silent, row.unseeded = group, silent, config.seed is None
        row.sequence.like = rows[0].sequence if row.index else None
    if request.prompt_logprobs is not None:
        rows[0].prompt_logprobs, rows[0].sequence.whole = [None], True
    return rows


def _row(
    request: Request,
    number: int,
    index: int,
    context: processors.Context,
    criteria: list[stopping.Criterion],
    generator: torch.Generator | None,
) -> Row:
    config, ids = context.config, context.prompt.ids
    row = Row(
        id=number,
        index=index,
        request=request,
        sequence=scheduler.Sequence(-1, ids[0].tolist(), context.total, salt=request.salt),
        step=Step(
            processors=tuple(processors.build(context)),  # an answer's own, for some remember how far it has come
            eos_ids=config.eos_token_ids,
            criteria=criteria,
        ),
        generator=generator,
        ids=None,
        text=_text(config, request.tokenizer, ids[0].tolist()),
    )
    if row.step.criteria or not row.by_scores:
        row.ids = torch.nn.functional.pad(ids, (0, context.total - ids.shape[1]))
    return row


def _text(config: GenerationConfig, tokenizer: Any, prompt: list[int]) -> AnswerText | None:
    if not hasattr(tokenizer, "decode"):
        return None
    stops = config.stop_texts
    reach = max(map(len, stops), default=1) - 1
    before = tokenizer.decode(prompt[-reach:], skip_special_tokens=True)[-reach:] if reach else ""
    return AnswerText(tokenizer, stops=stops, before=before)


def _no_ids(scores: Tensor) -> Tensor:
    return torch.empty((len(scores), 0), dtype=torch.long, device=scores.device)


def refuse_unbatched(model: GemmaConfig, config: GenerationConfig) -> None:
    """Raises InputError for what only generate() can do, or for a model whose keys depend on later tokens."""
    mode = config.get_generation_mode()
    wanted = {
        "use_bidirectional_attention": not model.is_causal,
        f"the strategy {mode}": mode not in ("greedy_search", "sample"),
        "num_return_sequences above 1 (see n of a Request)": (config.num_return_sequences > 1),
        "guidance_scale": config.guidance_scale not in (None, 1),
        "return_dict_in_generate": config.return_dict_in_generate,
    }
    for what, asked in wanted.items():
        if asked:
            raise InputError(f"a batch has no {what}: use generate().")


def _check_rope(config: GemmaConfig, total: int) -> None:
    """Tables of type longrope change for a whole call when its longest row passes the trained context."""
    for rope in {config.layer(i).rope: None for i in range(config.num_hidden_layers)}:
        settings = config.rope(rope)
        trained = settings.get("original_max_position_embeddings")
        if settings["rope_type"] == "longrope" and trained and total > trained:
            raise PromptTooLong(
                f"prompt and new tokens are {total}, but the rope type is longrope and batches stop at its trained "
                f"context of {trained}: rows beyond it would change their neighbours. Use generate()."
            )


def _tensor(prompt: Any, vocab_size: int) -> Tensor:
    """(1, P) int64. Raises InputError, TokenOutOfRange."""
    if isinstance(prompt, str | bytes | Mapping):
        raise InputError(f"a prompt is a {type(prompt).__name__}: give token ids, as in tokenizer(text).input_ids.")
    if not isinstance(prompt, Tensor):
        ids = list(prompt)
        for token in ids:
            if not is_whole(token):
                raise InputError(f"a prompt holds {token!r}; token ids are whole numbers.")
            if not 0 <= token < vocab_size:
                raise TokenOutOfRange(
                    f"token id {token} is outside the vocabulary of {vocab_size} ids (0 to {vocab_size - 1}): "
                    "was the prompt encoded with another model's tokenizer?"
                )
        return torch.tensor(ids, dtype=torch.long, device="cpu")[None]
    prompt = prompt[None] if prompt.dim() == 1 else prompt
    if prompt.dim() != 2 or prompt.shape[0] != 1:
        raise InputError(f"a prompt has shape {tuple(prompt.shape)}; it is one row of token ids, (P,) or (1, P).")
    return prompt


def _generators(config: GenerationConfig, ids: Tensor, count: int) -> list[torch.Generator]:
    """Each answer's own source of chance, so that no neighbour matters: from (seed, answer), or still to be seeded."""
    if config.seed is not None:
        return row_generators(config.seed, [ids[0].tolist()] * count, ids.device)
    return [torch.Generator(ids.device) for _ in range(count)]
