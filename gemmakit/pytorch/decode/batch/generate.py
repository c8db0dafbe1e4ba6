"""generate_batch(): many prompts of different lengths through one engine."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.batch.engine import BatchEngine, check_sizes
from gemmakit.pytorch.decode.batch.events import Event
from gemmakit.pytorch.decode.batch.requests import Request, Row, prepare_rows
from gemmakit.pytorch.decode.protocols import CausalLM

# (place of the prompt, token, why it ended or None) -> False cancels the prompt
OnToken = Callable[[int, int, "str | None"], Any]


@dataclass
class BatchResult:
    """ids: prompt and new tokens, an eos that ended it included. finish_reason and error: as in Event."""

    ids: list[int]
    prompt_length: int
    finish_reason: str
    error: Exception | None = None

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt_length :]


def generate_batch(
    model: CausalLM,
    prompts: Iterable[Request | Sequence[int] | Tensor],
    generation_config: GenerationConfig | None = None,
    *,
    max_batch_size: int = 8,
    page_size: int = 16,
    cache_tokens: int | None = None,
    cache_bytes: int | None = None,
    prefill_tokens: int = 512,
    share_prefixes: bool = True,
    assistant_model: CausalLM | None = None,
    on_token: OnToken | None = None,
    on_error: str = "raise",
    tokenizer: Any = None,
    logits_processor: Iterable[Any] = (),
    stopping_criteria: Iterable[Any] = (),
    **settings: Any,
) -> list[BatchResult]:
    """Continue many prompts of any lengths, `max_batch_size` at a time; results in the order of the prompts.

    Each gets the tokens that generate() gives it alone, also when sampled with `seed=`: then a result depends on the
    seed and its own prompt, and equal prompts give equal results. Near ties of a half format may fall the other way, as
    they may with any other batch size.

    Args:
        prompts: token ids, each a list or a tensor, padding on the left left out; or Requests with settings of
            their own, to which this call's do not apply.
        cache_tokens, cache_bytes: room for keys and values; by default enough for the longest `max_batch_size` prompts
            with their new tokens. page_size, prefill_tokens, share_prefixes, assistant_model: as in
            BatchEngine.
        on_token: called as f(place of the prompt, token, finish_reason or None) for every token as it comes; False
            cancels that prompt. What it raises ends the call.
        on_error: "raise" ends the call with the first thing that goes wrong, for prompts before anything runs;
            "return" gives such prompts a result with finish_reason "error" and the exception in `error`, and goes on.
        generation_config, tokenizer, logits_processor, stopping_criteria, settings: as for generate(). Settings of the
            cache and prefill_chunk_size have no part here: the pages are the cache, prefill_tokens the chunk.

    Raises:
        PromptTooLong, TokenOutOfRange, InputError, GenerationConfigError: naming the prompt. NumericalError: naming the
        prompt (counted from 0) and the step. NotEnoughMemory: the cache does not fit.
    """
    check_sizes(max_batch_size=max_batch_size, page_size=page_size)
    if on_error not in ("raise", "return"):
        raise InputError(f'on_error is {on_error!r}; it is "raise" or "return".')
    config = (generation_config or model.generation_config).updated(**settings)
    shared = (tokenizer, tuple(logits_processor), tuple(stopping_criteria))
    requests = [p if isinstance(p, Request) else Request(p, config, {}, *shared) for p in prompts]
    found = [_prepared(model, request, place, on_error) for place, request in enumerate(requests)]
    rows = [row for row in found if isinstance(row, Row)]
    results = [_begun(row) for row in found]
    if not rows:
        return results
    if cache_tokens is None and cache_bytes is None:
        cache_tokens = _enough(rows, max_batch_size, page_size)
    engine = BatchEngine(
        model,
        max_batch_size=max_batch_size,
        page_size=page_size,
        cache_tokens=cache_tokens,
        cache_bytes=cache_bytes,
        prefill_tokens=prefill_tokens,
        share_prefixes=share_prefixes,
        cuda_graphs=config.cuda_graphs,
        assistant_model=assistant_model,
    )
    for row in rows:
        refused = _queued(engine, row, on_error)
        if refused is not None:
            results[row.id] = _begun(refused)
    while engine.has_work:
        for event in engine.step():
            if event.error is not None and on_error == "raise":
                raise event.error
            _deliver(event, results[event.id])
            if on_token is None or event.token is None:
                continue
            if on_token(event.id, event.token, event.finish_reason) is False:
                engine.cancel(event.id)
    return results


def _prepared(model: CausalLM, request: Request, place: int, on_error: str) -> Row | InputError:
    try:
        rows = prepare_rows(model, request, place)
        if len(rows) > 1:
            raise InputError(f"n and best_of ask for {len(rows)} answers, and a result is one: give it several times.")
        return rows[0]
    except InputError as e:
        return _refused(e, place, on_error)


def _queued(engine: BatchEngine, row: Row, on_error: str) -> InputError | None:
    """None, or why the engine will never have room for it."""
    try:
        engine.queue([row])
        return None
    except InputError as e:
        return _refused(e, row.id, on_error)


def _deliver(event: Event, result: BatchResult) -> None:
    if event.token is not None:
        result.ids.append(event.token)
    result.finish_reason = event.finish_reason or ""
    result.error = event.error


def _begun(row: Row | InputError) -> BatchResult:
    if isinstance(row, Row):
        return BatchResult(list(row.sequence.tokens), row.prompt_length, "")
    return BatchResult([], 0, "error", row)


def _refused(error: InputError, place: int, on_error: str) -> InputError:
    """The error with the prompt's place in front, raised or given back."""
    named = type(error)(f"prompt {place}: {error}")
    if on_error == "raise":
        raise named from None
    return named


def _enough(rows: Iterable[Row], max_batch_size: int, page_size: int) -> int:
    """Tokens of cache with which no row is ever sent back; the last token of a row is never run."""
    pages = (-(-(row.sequence.limit - 1) // page_size) for row in rows)
    return sum(heapq.nlargest(max_batch_size, pages)) * page_size
