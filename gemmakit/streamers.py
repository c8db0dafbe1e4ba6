"""What comes of generation step by step, and the text of it: as events, printed, or for another thread or task."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from gemmakit.errors import InputError


class Tokenizer(Protocol):
    """The part of a tokenizer that streaming needs; one with `incremental_decoder` streams at constant cost a token."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class StepTokens:
    """What a step of decoding brought.

    tokens: for each row those that are new, an eos that ends it included; none once the row is over. finish_reasons:
    why each row is over by now: "eos", "stop" (a stop string or criterion), "length" (of tokens or time); None while it
    goes on.
    """

    tokens: Sequence[Sequence[int]]
    finish_reasons: Sequence[str | None]


class StreamEvent(NamedTuple):
    """A token of a stream.

    text: what is certain of the text now, which may be nothing; all pieces together are the text of all tokens.
    finish_reason: as in StepTokens, with the last token. scores: (V,) that it was chosen from, where asked for.
    """

    token: int
    text: str
    finish_reason: str | None
    scores: Any


class Token(NamedTuple):
    """A token of one row on its way into a stream; fields as in StreamEvent."""

    token: int
    finish_reason: str | None
    scores: Any


def events(tokens: Generator[Token], tokenizer: Tokenizer | None, skip_special_tokens: bool) -> Generator[StreamEvent]:
    """The tokens with their text. With `skip_special_tokens` a token that ends its row has none, whichever it is."""
    answer = None if tokenizer is None else AnswerText(tokenizer, skip_special_tokens)
    with closing(tokens):
        for token, reason, scores in tokens:
            yield StreamEvent(token, "" if answer is None else answer.push(token, reason), reason, scores)


class AnswerText:
    """The text of one answer, as far as it is certain: never half a character, and cut before the first stop string.

    before: the end of the prompt, where a stop string may begin. stopped: whether one was found; nothing is told then.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, stops: Sequence[str] = (), before: str = ""
    ):
        self._decoder = _decoder(tokenizer, {"skip_special_tokens": skip_special_tokens})
        self._skip, self._stops = skip_special_tokens, tuple(stops)
        self._text, self._told = before, len(before)  # what may still be part of a stop string, and how much is told
        self.stopped = False

    def push(self, token: int, reason: str | None) -> str:
        """What a token makes certain; with a reason it is the last one."""
        text = "" if reason == "eos" and self._skip else self._decoder.push([token])
        return self._certain(text) if reason is None else self._certain(text) + self.finish()

    def finish(self) -> str:
        """What was held back."""
        return self._certain(self._decoder.finish(), ended=True)

    def _certain(self, text: str, ended: bool = False) -> str:
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._text += text
        found = [self._text.find(stop, max(0, self._told - len(stop) + 1)) for stop in self._stops]
        first = min((at for at in found if at >= 0), default=None)
        self.stopped = first is not None
        end = first if first is not None else len(self._text) - (0 if ended else self._open())
        told = max(end, self._told)
        piece, gone = self._text[self._told : told], max(0, told - max(map(len, self._stops)) + 1)
        self._text, self._told = self._text[gone:], told - gone
        return piece

    def _open(self) -> int:
        """Characters at the end that may begin a stop string."""
        most = min(len(self._text), max(map(len, self._stops)) - 1)
        starts = (n for n in range(most, 0, -1) if any(stop.startswith(self._text[-n:]) for stop in self._stops))
        return next(starts, 0)


class BaseStreamer:
    """What generate() tells: the prompt's ids (1, P), then every new id (1,), then the end."""

    def put(self, value: Any) -> None:
        """Called with the prompt's ids, (1, P), and then with each new id, (1,)."""
        raise NotImplementedError

    def end(self) -> None:
        """Called once when nothing more comes, also after an error."""
        raise NotImplementedError


class TextStreamer(BaseStreamer):
    """Prints text as soon as it is certain; all of it together is what `tokenizer.decode` gives for all ids.

    Args:
        tokenizer: of the model that generates.
        skip_prompt: leave the prompt out.
        decode_kwargs: for `tokenizer.decode`, such as skip_special_tokens=True.

    To send the text elsewhere, override `on_finalized_text`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_prompt: bool = False, **decode_kwargs: Any):
        tokenizer.decode([], **decode_kwargs)  # a wrong argument fails here, not later in another thread
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._start()

    def _start(self) -> None:
        self.next_tokens_are_prompt = True
        self._decoder = _decoder(self.tokenizer, self.decode_kwargs)

    def put(self, value: Any) -> None:
        """Take ids of one row: a tensor, a list or a number. The first are the prompt, unless it is a lone new id."""
        ids, is_step = _one_row(value)
        prompt = self.next_tokens_are_prompt and not is_step
        self.next_tokens_are_prompt = False
        if prompt and self.skip_prompt:
            return
        text = self._decoder.push(ids)
        if text:
            self.on_finalized_text(text)

    def end(self) -> None:
        """Give out what was held back. The streamer can then follow another generation."""
        text = self._decoder.finish()
        self._start()
        self.on_finalized_text(text, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print text that is certain; override it to do something else."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """An iterator over the text, for a generate() that runs in another thread.

    Args:
        timeout: seconds to wait for the next text before `queue.Empty` is raised; None waits for ever. The iterator
            ends with the generation, also when that fails; the failure itself is the generating thread's.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ):
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.text_queue: queue.Queue[str | None] = queue.Queue()
        self.stop_signal = None
        self.timeout = timeout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put text that is certain into the queue, and the stop signal at the end."""
        if text:
            self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(self.stop_signal)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = self.text_queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text


class AsyncTextIteratorStreamer(TextStreamer):
    """An asynchronous iterator over the text, for a generate() that runs in another thread.

    Make it inside the event loop that will iterate. Args:
        timeout: seconds to wait for the next text before `TimeoutError` is raised; None waits for ever.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ):
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.loop = asyncio.get_running_loop()
        self.text_queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.stop_signal = None
        self.timeout = timeout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put text that is certain into the queue of the event loop, and the stop signal at the end."""
        if text:
            self.loop.call_soon_threadsafe(self.text_queue.put_nowait, text)
        if stream_end:
            self.loop.call_soon_threadsafe(self.text_queue.put_nowait, self.stop_signal)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        try:
            text = await asyncio.wait_for(self.text_queue.get(), self.timeout)
        except asyncio.TimeoutError as e:  # another class than TimeoutError before Python 3.11
            raise TimeoutError(f"no text came for {self.timeout} seconds.") from e
        if text is None:
            raise StopAsyncIteration
        return text


# -- ids to certain text -----------------------------------------------------------------------------------------------


class _Decoder(Protocol):
    def push(self, ids: Any) -> str: ...

    def finish(self) -> str: ...


def _decoder(tokenizer: Any, options: dict[str, Any]) -> _Decoder:
    own = getattr(tokenizer, "incremental_decoder", None)
    return _Redecoded(tokenizer, options) if own is None else own(**options)


class _Redecoded:
    """For a tokenizer that has only `decode`: decodes everything anew at each token.

    Where it cleans up spaces, by rules that nobody here knows, all text comes at the end.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]):
        self._tokenizer, self._options = tokenizer, options
        name = "clean_up_tokenization_spaces"
        self._waits = bool(options.get(name, getattr(tokenizer, name, False)))
        self._ids: list[int] = []
        self._given = 0

    def push(self, ids: Any) -> str:
        self._ids += ids
        return "" if self._waits else self._new(self._tokenizer.decode(self._ids, **self._options).rstrip("\ufffd"))

    def finish(self) -> str:
        return self._new(self._tokenizer.decode(self._ids, **self._options))

    def _new(self, certain: str) -> str:
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        return new


def _one_row(value: Any) -> tuple[list[int], bool]:
    """The ids, and whether they are one step of one row (shape (1,)) rather than a prompt."""
    ids = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(ids, int):
        return [ids], True
    if ids and isinstance(ids[0], (list, tuple)):
        if len(ids) > 1:
            raise InputError(f"a streamer follows one row, and this batch has {len(ids)}: stream them one at a time.")
        return list(ids[0]), False
    return list(ids), len(ids) == 1
