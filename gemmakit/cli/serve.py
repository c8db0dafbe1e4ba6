"""gemmakit serve: a model behind the API that every client knows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import gemmakit
from gemmakit.cli import options as o
from gemmakit.cli import processes
from gemmakit.cli.shell import note
from gemmakit.errors import InputError, MissingDependency
from gemmakit.serve.settings import ServeSettings


def serve(
    model: Annotated[str | None, Argument(help="Folder or Hub id; if left out, the demo model.")] = None,
    host: Annotated[str, Option(metavar="NAME", help="Where to listen; only this machine if left out.")] = "127.0.0.1",
    port: Annotated[int, Option(metavar="N", min=0, max=65535, help="0: any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        Option(metavar="KEY", help=f"Asked of every request; may be repeated. Or in {o.KEY_VARIABLE}, commas between."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, Option(metavar="NAME", help="What clients may call the model; may be repeated.")
    ] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    tensor: o.Tensor = None,
    replicas: Annotated[
        int | None, Option(metavar="N", min=1, help="So many models behind one address, by Ray Serve.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=DIR",
            help="An adapter that requests choose by its NAME as their model; may be repeated. DIR alone is for all.",
        ),
    ] = None,
    max_batch_size: Annotated[int, Option(metavar="N", min=1, help="Answers that are generated side by side.")] = 8,
    max_waiting: Annotated[int, Option(metavar="N", min=1, help="Requests that may wait; then 429.")] = 256,
    prefill_tokens: Annotated[
        int,
        Option(metavar="N", min=1, help="Prompt tokens a step; fewer, and running answers pause less for new ones."),
    ] = 512,
    cache_bytes: Annotated[int | None, Option(metavar="N", min=1, help="Memory for keys and values.")] = None,
    context: Annotated[
        int | None, Option(metavar="N", min=1, help="Tokens of a prompt and its answer; the model's if left out.")
    ] = None,
    batch_invariant: Annotated[
        bool | None,
        Option(
            "--batch-invariant/--no-batch-invariant",
            help="The same bits whatever else runs and on any number of threads, which the CPU gives where it can if "
            "left out.",
        ),
    ] = None,
    draft: o.Draft = None,
    speculate: o.Speculate = None,
    allowed_host: Annotated[
        list[str] | None, Option(metavar="NAME", help="A name this server goes by; * for any. May be repeated.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, Option(metavar="URL", help="A site whose pages may ask; * for any. May be repeated.")
    ] = None,
    drain_seconds: Annotated[float, Option(metavar="S", min=0, help="For running answers, once told to end.")] = 30.0,
    state: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where /v1/files and /v1/batches are kept; neither if left out.")
    ] = None,
    log_format: Annotated[str, Option(metavar="KIND", help="text or json: one line a request.")] = "text",
    otlp_traces_endpoint: Annotated[
        str | None, Option(metavar="URL", help="Where OpenTelemetry's spans go, http://HOST:4318/v1/traces.")
    ] = None,
) -> int:
    """Serve a model over HTTP: OpenAI's API (chat, completions, models) and more.

    Any OpenAI client works with base_url http://127.0.0.1:8000/v1. Ctrl-C lets running answers end, a second one does
    not.
    """
    if log_format not in ("text", "json"):
        raise InputError(f"--log-format is {log_format!r}; it must be text or json.")
    if tensor is not None and adapter:
        raise InputError("--tensor splits a plain model: gemmakit merge makes an adapter part of one.")
    if tensor is not None and draft is not None:
        raise InputError("--draft helps a model in one process: --tensor does without it.")
    if replicas is not None and (other := "--tensor" if tensor is not None else "--state" if state else None):
        why = "splits one" if tensor is not None else "is kept by one process"
        raise InputError(f"--replicas runs whole models, a process each, and {other} {why}: give one of them.")
    if (code := processes.spread(tensor)) is not None:
        return code
    try:
        from gemmakit.serve.server import listen, run
        from gemmakit.serve.service import Loading, follow_first
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gemmakit"):
            raise
        raise MissingDependency(f"serving needs the package {error.name}: pip install 'gemmakit[serve]'.") from None
    settings = ServeSettings(
        api_keys=(*(api_key or ()), *_keys_of(os.environ.get(o.KEY_VARIABLE, ""))),
        allowed_hosts=(host, *(allowed_host or ())),
        cors_origins=tuple(cors_origin or ()),
        drain_s=drain_seconds,
        log_format=log_format,
        state=state,
        otlp_endpoint=otlp_traces_endpoint,
    )
    folded, named = _adapters(adapter or ())
    loading = Loading(
        str(model or gemmakit.demo_model()),
        tuple(served_model_name or (_name(model),)),
        dict(
            device_map=device,
            dtype=dtype,
            revision=revision,
            **({"adapter": folded} if folded else {}),
            **o.given(assistant_model=draft),
            **o.split(tensor),
        ),
        context,
        dict(
            max_batch_size=max_batch_size,
            max_waiting=max_waiting,
            prefill_tokens=prefill_tokens,
            cache_bytes=cache_bytes,
            batch_invariant=batch_invariant,
            speculate=speculate,
        ),
        named,
    )
    if not processes.is_first(tensor):
        follow_first(loading)
        return 0
    socket = listen(host, port, settings.stall_s)
    port = socket.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    note(f"loading {model or 'the demo model'}")

    def ready() -> None:
        note(f"serving {loading.names[0]} on http://{shown}:{port}")

    if replicas is not None:
        from gemmakit.serve import replicas as deployment

        socket.close()  # it is free; Ray's own process takes it
        return deployment.run(settings, (host, port), loading, replicas, ready, note)
    return run(settings, socket, loading, ready)


def _keys_of(text: str) -> list[str]:
    return [key.strip() for key in text.split(",") if key.strip()]


def _adapters(given: Sequence[str]) -> tuple[Path | None, dict[str, Path]]:
    """The adapter that is for all requests, and those that requests choose, by name. Raises InputError."""
    named: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            if len(given) > 1:
                raise InputError(f"--adapter {text} is for all requests, so there can be no other: write NAME={text}.")
            return Path(text), {}
        if not name or not folder or name in named:
            raise InputError(f"--adapter is {text!r}; it must be NAME=DIR, each name once.")
        named[name] = Path(folder)
    return None, named


def _name(model: str | None) -> str:
    """What a model is called where nobody says: its id on the Hub, or its folder's or file's name."""
    if model is None:
        return "gemmakit-demo"
    path = Path(model)
    return path.stem if path.is_file() else path.resolve().name if path.exists() else model
