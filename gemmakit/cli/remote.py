"""A running server in place of a model: the same answers over HTTP, without torch."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from gemmakit import __version__
from gemmakit.cli.answer import Answer, Write
from gemmakit.cli.conversation import Conversation
from gemmakit.cli.options import DEFAULT_NEW_TOKENS, KEY_VARIABLE
from gemmakit.errors import InputError, PromptTooLong, ServerError
from gemmakit.text.response import Thought

CONNECT_S = 10.0
SILENT_S = 120.0  # a server that is alive says so in less
# Settings of generate() that a request has by the same name; the others have names of their own.
_SAME = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def connect(url: str, key: str | None, model: str | None, local: Mapping[str, Any]) -> Server:
    """The server of --server. local: options of a model that is loaded here, which have no use beside it."""
    if given := [option for option, value in local.items() if value]:
        raise InputError(f"{', '.join(given)}: of a model that is loaded here; with --server leave it out.")
    return Server(url, key or os.environ.get(KEY_VARIABLE, "").partition(",")[0].strip(), model)


@dataclass(frozen=True)
class Prompt:
    """A text or messages, and how many tokens the server makes of them. variables: of the chat template."""

    said: str | list[dict[str, str]]
    length: int
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.length


class Server:
    """A server that was found at an address. model: what it calls its model; context: tokens of a prompt and answer;
    thinks: whether its model can.

    Raises ServerError where there is none, or it refuses.
    """

    def __init__(self, url: str, key: str = "", model: str | None = None):
        self._kind, self._at, self._path = _address(url)
        self.url = f"{'https' if self._kind is HTTPSConnection else 'http'}://{self._at}{self._path}"
        self._headers = {"Content-Type": "application/json", "User-Agent": f"gemmakit/{__version__}"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        cards = self._get("GET", "/v1/models").get("data") or [{}]
        self.model = str(model or cards[0].get("id", ""))
        self.context = int(cards[0].get("max_model_len") or 0)
        self.thinks = "thinking" in (cards[0].get("capabilities") or ())

    def prompt(self, said: str | list[dict[str, str]], variables: Mapping[str, Any]) -> Prompt:
        name = "prompt" if isinstance(said, str) else "messages"
        body = {"model": self.model, name: said, **_variables(variables)}
        return Prompt(said, int(self._get("POST", "/tokenize", body)["count"]), variables)

    def answer(self, prompt: Prompt, write: Write, settings: Mapping[str, Any]) -> Answer:
        """What `gemmakit.cli.answer.answer` gives. Ctrl-C ends the answer here and there, and keeps the text."""
        parts, reason, used = list[str | Thought](), "interrupted", 0
        start = first = last = time.perf_counter()
        with suppress(KeyboardInterrupt), closing(self._stream(prompt, settings)) as events:
            for event in events:
                used = (event.get("usage") or {}).get("completion_tokens", used)
                for choice in event.get("choices", ()):
                    for piece in _pieces(choice):
                        last = time.perf_counter()
                        first = first if parts else last
                        parts.append(piece)
                        write(piece)
                    reason = choice["finish_reason"] or reason
        return Answer(
            text="".join(part for part in parts if isinstance(part, str)),
            thought="".join(part.text for part in parts if isinstance(part, Thought)),
            finish_reason=reason,
            prompt_tokens=len(prompt),
            new_tokens=used or len(parts),  # of an interrupted answer nobody tells: pieces, which most tokens are
            first_s=first - start,
            rest_s=last - first,
        )

    def _stream(self, prompt: Prompt, settings: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        chat = not isinstance(prompt.said, str)
        body = {
            "model": self.model,
            "messages" if chat else "prompt": prompt.said,
            "stream": True,
            "stream_options": {"include_usage": True},
            **_variables(prompt.variables),
            **self._fields(prompt, settings),
        }
        with self._asked("POST", "/v1/chat/completions" if chat else "/v1/completions", body) as response:
            yield from _events(response)

    def _fields(self, prompt: Prompt, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of generate() as a request has them."""
        fields = {name: settings[name] for name in _SAME if name in settings}
        if settings.get("do_sample") is False:
            fields["temperature"] = 0
        elif settings.get("do_sample"):
            fields.setdefault("seed", secrets.randbelow(2**31))  # what asks for chance, and nothing else
        if stop := settings.get("stop_strings"):
            fields["stop"] = list(stop)
        asked = settings.get("max_new_tokens")
        fields["max_tokens"] = self._room(len(prompt)) if asked is None else asked
        return fields

    def _room(self, length: int) -> int:
        if self.context and length >= self.context:
            raise PromptTooLong(
                f"prompt has {length} tokens, but the context holds {self.context}. Shorten the prompt."
            )
        return min(DEFAULT_NEW_TOKENS, self.context - length) if self.context else DEFAULT_NEW_TOKENS

    def _get(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        with self._asked(method, path, body) as response:
            return _object(response.read())

    @contextmanager
    def _asked(self, method: str, path: str, body: Any) -> Generator[HTTPResponse]:
        """The response to a request; closing it tells the server that nobody reads on."""
        with closing(self._kind(self._at, timeout=CONNECT_S)) as connection:
            try:
                connection.connect()
                connection.sock.settimeout(SILENT_S)
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, f"{self._path}{path}", data, self._headers)
                with connection.getresponse() as response:
                    if response.status != 200:
                        raise ServerError(f"{self.url} refuses ({response.status}): {_told(response)}")
                    yield response
            except (OSError, HTTPException) as error:
                said = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise ServerError(
                    f"{self.url} does not answer: {said}. Is it running? gemmakit serve starts one."
                ) from None


def _variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {"chat_template_kwargs": dict(variables)} if variables else {}


def _pieces(choice: Mapping[str, Any]) -> list[str | Thought]:
    """What a piece of an answer says, and what the model thinks before it."""
    if "text" in choice:
        return [choice["text"]] if choice["text"] else []
    thought, text = choice["delta"].get("reasoning_content"), choice["delta"].get("content")
    return [*([Thought(thought)] if thought else []), *([text] if text else [])]


def _address(url: str) -> tuple[type[HTTPConnection], str, str]:
    """Which kind of connection, to which host and port, and what stands before /v1."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        fits = False
    if not fits or parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"--server is {url!r:.200}; it must be an address such as http://127.0.0.1:8000.")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return HTTPSConnection if parts.scheme == "https" else HTTPConnection, parts.netloc, path


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events. Raises ServerError where it ends before it says so."""
    for line in response:
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if line.startswith(b"data:"):
            event = _object(data)
            if "error" in event:
                raise ServerError(f"the server gave up: {_message(event) or 'it does not say why'}")
            yield event
    raise ServerError("the server ended in the middle of the answer.")


def _object(data: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = json.loads(data)
        if isinstance(found, dict):
            return found
    raise ServerError(f"this is no server of gemmakit's: it says {data[:80]!r} where a JSON object was asked for.")


def _told(response: HTTPResponse) -> str:
    data = response.read(2**16)
    with suppress(ServerError):
        if said := _message(_object(data)):
            return said
    return response.reason


def _message(body: Mapping[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message", "")) if isinstance(error, Mapping) else str(error or "")


@dataclass
class ServerConversation(Conversation):
    """A conversation with a server, which keeps what it read of it."""

    pipe: Any = None
    server: Server = field(kw_only=True)

    @property
    def name(self) -> str:
        return self.server.model

    @property
    def context(self) -> int:
        return self.server.context

    def _encode(self, messages: Sequence[dict[str, str]]) -> Prompt:
        return self.server.prompt(list(messages), self.variables)

    def _say(self, prompt: Any, write: Write) -> Answer:
        return self.server.answer(prompt, write, self.settings)
