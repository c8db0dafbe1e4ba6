"""A server in this process, on a free port of this machine, with a real model behind it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

import gemmakit
from gemmakit.serve.app import create_app
from gemmakit.serve.server import Server, listen
from gemmakit.serve.service import Loading, Service
from gemmakit.serve.settings import ServeSettings

NAME = "gemmakit-demo"


@dataclass
class Running:
    """url: without /v1; service: what its routes share, in this process."""

    url: str
    service: Service

    def post(self, path: str, **body: Any) -> httpx.Response:
        kind = {"Content-Type": "application/json"}
        # In ASCII, as JSON may hold what UTF-8 cannot.
        return httpx.post(f"{self.url}{path}", content=json.dumps(body), headers=kind, timeout=60)


@contextmanager
def serving(
    settings: ServeSettings | None = None, source: Any = None, loading: Any = None, **engine: Any
) -> Iterator[Running]:
    """A server in a thread of this process. loading: more arguments of from_pretrained; engine: of BatchEngine."""
    settings = settings or ServeSettings()
    service = Service(settings)
    options = {"device_map": "cpu", **(loading or {})}
    opening = Loading(str(source or gemmakit.demo_model()), (NAME,), options, None, engine)
    socket = listen("127.0.0.1", 0, settings.stall_s)
    server = Server(create_app(service), service, lambda: service.load(opening))
    thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    until = time.monotonic() + 60
    while service.worker is None and server.failure is None and time.monotonic() < until:
        time.sleep(0.02)
    assert service.worker is not None, server.failure
    try:
        yield Running(url, service)
    finally:
        server.should_exit = True
        thread.join(20)
        service.worker.close()
        socket.close()
