"""HTTP/1.1 by uvicorn and h11, for a connection that has to say what it wants."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# For the line and the headers of a request to arrive, from when the connection is there.
HEAD_S = 20.0


class PatientProtocol(H11Protocol):
    """Cuts off who takes longer than HEAD_S to send a request's head: uvicorn would hold the connection for ever."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A head is on its way where no request is at work. After an answer, silence is uvicorn's to end.
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        elif self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._patience is not None:
            self._patience.cancel()

    def _wait(self) -> None:
        if self._patience is None:
            self._patience = self.loop.call_later(HEAD_S, self._give_up)

    def _give_up(self) -> None:
        self._patience = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
