"""What a server allows and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServeSettings:
    """How a server is met from outside.

    api_keys: any of them opens every route but /health; none: no key is asked. allowed_hosts: names a request may be
    addressed to beside the loopback ones, "*" for any. cors_origins: pages of other origins that may ask.
    max_body_bytes: of a request; max_upload_bytes: of a file for a batch. body_s: for a body to arrive.
    buffered_events: tokens that wait for a slow reader before its request is dropped. heartbeat_s: silence of a stream
    until a comment is sent. queue_s: how long a request may wait for the engine. compile_s: for a schema, an expression
    or a grammar. drain_s: for running answers once the server is told to end. stall_s: for a reader that takes nothing.
    state: the folder that files and batches are kept in; None for neither. batch_rows: of a stored batch
    that are asked at a time, where there is room. otlp_endpoint: where spans are sent; None leaves OpenTelemetry as it
    is found.
    """

    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    body_s: float = 30.0
    stall_s: float = 60.0
    heartbeat_s: float = 15.0
    queue_s: float | None = 300.0
    compile_s: float = 5.0
    drain_s: float = 30.0
    buffered_events: int = 4096
    log_format: str = "text"
    max_upload_bytes: int = 200 * 2**20
    state: Path | None = None
    batch_rows: int = 16
    otlp_endpoint: str | None = None
