"""Who may ask, and how much: plain ASGI, before a route or a parser sees anything."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemmakit.serve.refusals import Refusal
from gemmakit.serve.settings import ServeSettings

OPEN, PAGE = ("/health",), "/"


class Origins:
    """Refuses what is addressed to another name, and what another site's page sends.

    A page can make a browser ask any address, and its own name can be made to lead here (DNS rebinding): the browser
    then says which page asks (Origin) and which name it believes to be talking to (Host). An address that is a number
    cannot be made to lead elsewhere.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings):
        self.app = app
        self.hosts = {"localhost", *(host.lower() for host in settings.allowed_hosts)}
        self.origins = {origin.lower().rstrip("/") for origin in settings.cors_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (self.app if refusal is None else refusal.response())(scope, receive, send)

    def _refusal(self, headers: Headers) -> Refusal | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return Refusal(403, "this server does not go by that name: allow it with --allowed-host.", code="host")
        if len(origins) > 1 or not all(self._may_ask(origin.lower(), hosts[0].lower()) for origin in origins):
            return Refusal(403, "pages of that origin may not ask: allow it with --cors-origin.", code="origin")
        return None

    def _is_ours(self, host: str) -> bool:
        name = _name_of(f"//{host}")
        return name is not None and ("*" in self.hosts or name in self.hosts or _is_number(name))

    def _may_ask(self, origin: str, host: str) -> bool:
        return origin in (f"http://{host}", f"https://{host}") or not self.origins.isdisjoint((origin, "*"))


def _name_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Keys:
    """Asks for a key, in `Authorization: Bearer` or `x-api-key`, on every route but /health.

    Every key is compared whole, whatever the others said, so that time tells nothing of them. Who opens the page has
    nowhere to put a key yet: it is sent all the same, as a 401, and asks for one itself.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings):
        self.app, self.keys = app, [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.keys or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        given = _given(Headers(scope=scope))
        if given is None or not sum(hmac.compare_digest(given, key) for key in self.keys):
            if scope["path"] == PAGE and scope["method"] == "GET":
                await self.app(scope, receive, _as_401(send))
                return
            said = "the key is missing or wrong: send Authorization: Bearer KEY, once."
            refusal = Refusal(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await refusal.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["api_key"] = given.decode("latin-1")
        await self.app(scope, receive, send)


def _as_401(send: Send) -> Send:
    async def sending(message: Message) -> None:
        await send({**message, "status": 401} if message["type"] == "http.response.start" else message)

    return sending


def _given(headers: Headers) -> bytes | None:
    """The one key of a request; None for no key or several."""
    bearer, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if len(bearer) + len(plain) != 1:
        return None
    if plain:
        return plain[0].encode("latin-1")
    scheme, _, key = bearer[0].partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else None


class Bodies:
    """Bounds what a request's body may weigh and how long it may take to arrive.

    larger: limits of paths that begin so, where they are other ones.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, larger: Sequence[tuple[str, int]] = ()):
        self.app, self.settings, self.larger = app, settings, larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = next((size for path, size in self.larger if scope["path"].startswith(path)), None)
        limit = self.settings.max_body_bytes if limit is None else limit
        said = Headers(scope=scope).get("content-length", "0")
        if said.isdigit() and int(said[:20]) > limit:
            await _too_large(limit).response()(scope, receive, send)
            return
        body = _Body(receive, limit, self.settings.body_s)
        try:
            await self.app(scope, body.receive, send)
        except Refusal as refusal:  # met while the body was read, where no route had answered
            await refusal.response()(scope, receive, send)


class _Body:
    """`receive`, counted and timed until the body is there."""

    def __init__(self, receive: Receive, limit: int, seconds: float):
        self._receive, self.limit, self.seconds = receive, limit, seconds
        self.size, self.whole = 0, False

    async def receive(self) -> Message:
        if self.whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self.seconds)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.seconds:.0f} s.") from None
        self.size += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.size > self.limit:
            raise _too_large(self.limit)
        return message


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is over {limit} bytes, the most that is read.", headers={"Connection": "close"})
