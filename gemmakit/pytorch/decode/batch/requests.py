"""One request of a batch: its prompt and settings, checked; and how its next token is chosen among its neighbours'.

Axis letters: R rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from gemmakit.checks import Real, Whole, check_fields, is_whole
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, PromptTooLong, TokenOutOfRange
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.cache.paged import sent
from gemmakit.pytorch.decode import processors, stopping
from gemmakit.pytorch.decode.batch import scheduler
from gemmakit.pytorch.decode.batch.events import Usage
from gemmakit.pytorch.decode.healing import heal
from gemmakit.pytorch.decode.prompt import prepare
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import Exponential, Pick, greedy, row_generators, sampler
from gemmakit.pytorch.decode.step import Step

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
    cache_salt: prefixes are shared among requests of one salt only. deadline: seconds it may wait before it runs.
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
    cache_salt: str = ""
    deadline: Annotated[float | None, Real(0)] = None

    def check(self) -> None:
        """Raises InputError for a field out of range."""
        check_fields(self, InputError)
        if self.best_of is not None and self.best_of < self.n:
            raise InputError(f"best_of is {self.best_of}, but n is {self.n}: give a best_of of at least n.")
        if not isinstance(self.cache_salt, str):
            raise InputError(f"cache_salt is a {type(self.cache_salt).__name__}; it is a string.")


@dataclass(eq=False)
class Row:
    """A request at work: its place in the schedule and everything its next token depends on.

    step: with an eos for the host alone. ids: (1, limit), the tokens once more, on the device, for processors and
    criteria that read them; or None. added, started, spoke: when it was added, first ran, gave its first token, by
    the monotonic clock.
    """

    sequence: scheduler.Sequence
    prompt_length: int
    step: Step
    generator: torch.Generator | None
    ids: Tensor | None
    deadline: float | None = None
    added: float = field(default_factory=time.monotonic)
    started: float | None = None
    spoke: float | None = None

    @property
    def id(self) -> int:
        return self.sequence.id

    @property
    def chain(self) -> tuple[processors.Processor, ...]:
        return tuple(self.step.processors)

    @property
    def by_scores(self) -> bool:
        return all(isinstance(processor, processors.ScoresOnly) for processor in self.step.processors)

    @property
    def usage(self) -> Usage:
        now, tokens = time.monotonic(), len(self.sequence.tokens) - self.prompt_length
        queued = (now if self.started is None else self.started) - self.added
        first = None if self.spoke is None else self.spoke - self.added
        return Usage(self.prompt_length, self.sequence.cached or 0, tokens, queued, first, now - self.added)

    def process(self, scores: Tensor) -> Tensor:
        """scores: (1, V) -> (1, V) after this request's processors."""
        assert self.ids is not None
        out = self.step.process(self.ids[:, : len(self.sequence.tokens)], scores)
        if out.shape != scores.shape:
            raise InputError(f"a logits processor gave {tuple(out.shape)} for scores {tuple(scores.shape)}.")
        return out.to(scores)

    def ends(self, token: int, scores: Tensor | None) -> str | None:
        """Why the row ends with `token`: "eos", "stop", "length"; or None.

        scores: (1, V), those it was picked from; only rows without criteria may have none.
        """
        count = len(self.sequence.tokens) + 1
        if self.ids is not None:
            self.ids[0, count - 1] = token
        reason = self.step.reason(token, None if self.ids is None else self.ids[:, :count], scores)
        return "length" if reason is None and count >= self.sequence.limit else reason


@torch.no_grad()
def prepare_row(model: CausalLM, request: Request, number: int) -> Row:
    """Check a request and make its row.

    Raises InputError, GenerationConfigError, TokenOutOfRange; PromptTooLong if the context is too short.
    """
    request.check()
    config = (request.generation_config or model.generation_config).updated(**request.settings)
    config.validate(model.config.vocab_size)
    refuse_unbatched(model.config, config)
    vocabulary = model.config.vocab_size
    # The engine's pages are the cache, whatever cache the settings name.
    given = _tensor(request.prompt, vocabulary)
    prompt, new = prepare(model, config.updated(use_cache=False), given, None, None, None)
    if config.token_healing:
        heal(model, prompt, request.tokenizer)
    if prompt.mask is not None:
        prompt = replace(prompt, ids=prompt.ids[prompt.mask][None], mask=None)
    ids, length = prompt.ids, prompt.ids.shape[1]
    _check_rope(model.config, length + new)
    context = processors.Context(
        config,
        prompt,
        length + new,
        vocabulary,
        custom=tuple(request.logits_processor),
        model=model,
        tokenizer=request.tokenizer,
    )
    row = Row(
        sequence=scheduler.Sequence(number, ids[0].tolist(), length + new, salt=request.cache_salt),
        prompt_length=length,
        step=Step(
            processors=tuple(processors.build(context)),
            eos_ids=config.eos_token_ids,
            criteria=stopping.build(config, request.tokenizer, tuple(request.stopping_criteria), vocabulary),
        ),
        generator=_generator(config, ids) if config.do_sample else None,
        ids=None,
        deadline=request.deadline,
    )
    if row.step.criteria or not row.by_scores:
        row.ids = torch.nn.functional.pad(ids, (0, new))
    return row


def choose_tokens(rows: Sequence[Row], logits: Tensor) -> tuple[Tensor, Tensor, dict[int, Exception]]:
    """The next token of each row (NO_TOKEN where there is none), the scores it comes from, and what went wrong.

    logits: (R, V); tokens: int64 (R,), on the device, for which nobody has waited; scores: float32 (R, V), after each
    row's processors. A processor that raises costs its own row only: the exception is given under the row's place.
    """
    chain = shared_chain(rows)
    if chain is not None:
        return *Step(chain, _picker(rows)).choose(_no_ids(logits), logits), {}
    lines, errors = list(logits.float().split(1)), {}
    together: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row.by_scores:
            together.setdefault(row.chain, []).append(i)
            continue
        try:
            lines[i] = row.process(lines[i])
        except Exception as e:
            errors[i] = e
    for chain, places in together.items():
        if chain:
            group = torch.cat([lines[i] for i in places])
            for i, line in zip(places, Step(chain).process(_no_ids(group), group).split(1), strict=True):
                lines[i] = line
    scores = torch.cat(lines)
    return _picker(rows)(scores), scores, errors


def shared_chain(rows: Sequence[Row]) -> tuple[processors.Processor, ...] | None:
    """The processors of all rows, if they are the same and read the scores alone."""
    first = rows[0].chain
    return first if all(row.by_scores and row.chain == first for row in rows) else None


def _no_ids(scores: Tensor) -> Tensor:
    return torch.empty((len(scores), 0), dtype=torch.long, device=scores.device)


def refuse_unbatched(model: GemmaConfig, config: GenerationConfig) -> None:
    """Raises InputError for what only generate() can do, or for a model whose keys depend on later tokens."""
    mode = config.get_generation_mode()
    wanted = {
        "use_bidirectional_attention": bool(model.use_bidirectional_attention),
        f"the strategy {mode}": mode not in ("greedy_search", "sample"),
        "num_return_sequences above 1 (add the prompt several times, each with its own seed)": (
            config.num_return_sequences > 1
        ),
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


def _generator(config: GenerationConfig, ids: Tensor) -> torch.Generator:
    """The request's own source of chance: from (seed, prompt), or seeded by torch's, so that no neighbour matters."""
    if config.seed is not None:
        return row_generators(config.seed, [ids[0].tolist()], ids.device)[0]
    return torch.Generator(ids.device).manual_seed(int(torch.randint(2**63 - 1, ())))


def _picker(rows: Sequence[Row]) -> Pick:
    """Draws where a row is sampled, takes the best where not."""
    sampled = [i for i, row in enumerate(rows) if row.generator is not None]
    if not sampled:
        return greedy
    draw = sampler(Exponential([row.generator for row in rows if row.generator is not None]))
    if len(sampled) == len(rows):
        return draw

    def pick(scores: Tensor) -> Tensor:
        at = sent(sampled, scores.device)
        return greedy(scores).index_copy(0, at, draw(scores[at]))

    return pick
