"""gemmakit batch: a file of requests in, a file of answers out, through the batch engine."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import time
from collections.abc import Awaitable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import gemmakit
from gemmakit.cli import options as o
from gemmakit.cli import processes
from gemmakit.cli.shell import INTERRUPTED, note
from gemmakit.errors import InputError, MissingDependency
from gemmakit.files import sampled_digest
from gemmakit.hub import HubOptions, commit_of, find_file, local_directory, packaged_model
from gemmakit.progress import progress_bar
from gemmakit.serve.batch_format import Row
from gemmakit.serve.batch_runner import Run, open_run, run_batch
from gemmakit.serve.settings import ServeSettings

SPEAK_EVERY_S = 10.0
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
MAX_SEED = 2**31


def batch(
    input_: Annotated[Path, Argument(metavar="IN", help="Requests, one a line: OpenAI's batch format or short ones.")],
    output: Annotated[Path, Argument(metavar="OUT", help="Where answers are appended as they come; a new file.")],
    model: o.Model = None,
    resume: Annotated[bool, Option("--resume", help="Go on with OUT where it was left, by whatever it was.")] = False,
    errors: Annotated[
        Path | None, Option(metavar="FILE", help="Where rows that cannot be answered go; OUT.errors if left out.")
    ] = None,
    concurrency: Annotated[int, Option(metavar="N", min=1, max=1024, help="Rows that run side by side.")] = 8,
    max_new_tokens: Annotated[
        int | None,
        Option("--max-new-tokens", "-n", metavar="N", min=1, help="Of rows that name none; short ones get 256."),
    ] = None,
    seed: Annotated[
        int, Option(metavar="N", min=0, help="Of rows that are drawn and name none; each draws apart.")
    ] = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    tensor: o.Tensor = None,
    ray: Annotated[
        bool, Option("--ray", help="On the Ray cluster that is there, which RAY_ADDRESS names or this machine is of.")
    ] = False,
    actors: Annotated[
        int | None, Option(metavar="N", min=1, help="With --ray: models to load; if left out, one a GPU or node.")
    ] = None,
    cache_bytes: Annotated[int | None, Option(metavar="N", min=1, help="Memory for keys and values.")] = None,
) -> int:
    """Answer a file of requests: {"prompt": ...}, {"messages": ...} or {"input": ...} a line, settings beside it, or OpenAI's batch lines.

    Every row is answered by --model, whatever model it names. Answers come in the order in which they end; custom_id
    says whose they are (row-N where a short row has none). OUT.journal keeps what OUT was made with. After Ctrl-C, a
    kill or a full disk the same command with --resume does what is missing, with the answers it would have had.
    """  # noqa: E501
    if find_spec("fastapi") is None:
        raise MissingDependency("batches need the package fastapi: pip install 'gemmakit[serve]'.")
    if ray and tensor is not None:
        raise InputError("--ray runs whole models, an actor each, and --tensor splits one: give one of them.")
    if actors is not None and not ray:
        raise InputError("--actors is of --ray.")
    if (code := processes.spread(tensor)) is not None:
        return code
    source = str(model or gemmakit.demo_model())
    options = dict(device_map=device, dtype=dtype, revision=revision, **o.split(tensor))
    engine = dict(max_batch_size=concurrency, cache_bytes=cache_bytes)
    if not processes.is_first(tensor):
        from gemmakit.serve.service import Loading, follow_first

        follow_first(Loading(source, ("gemmakit",), options, None, engine))
        return 0
    made_with = {
        "model": f"{model or 'the demo model'} ({_digest(source, revision)})",
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        **({} if tensor is None else {"tensor": tensor}),
    }
    run = open_run(input_, output, made_with, errors, resume=resume)
    if run.done:
        note(f"{run.done:,} of {run.asked.rows:,} rows are done already")
    from gemmakit.serve.app import ask, bare_app  # loads torch; what is wrong with the files is known by now
    from gemmakit.serve.service import Loading, Service

    loading, service = Loading(source, ("gemmakit",), options, None, engine), Service(ServeSettings(queue_s=None))
    try:
        with ExitStack() as stack:
            if ray:
                from gemmakit.serve.ray_pool import pool

                cluster = stack.enter_context(pool(loading, actors, concurrency, note))
                side_by_side, draws, asked = concurrency * len(cluster.actors), cluster.draws, cluster.answer
            else:
                service.load(loading)
                side_by_side, draws, asked = concurrency, service.ready().draws, partial(ask, bare_app(service))

            async def answer(row: Row) -> tuple[int, Mapping[str, Any]]:
                return await asked(row.url, _body(row, draws, max_new_tokens, seed))

            with _Told(run) as told:
                asyncio.run(_until_ctrl_c(run_batch(run, answer, side_by_side, told)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        note(str(run.stopped("interrupted")))
        return INTERRUPTED
    finally:
        run.close()
        if service.worker is not None:  # a thread within torch when the interpreter goes would abort the process
            service.worker.close()
    return 0


async def _until_ctrl_c(work: Awaitable[None]) -> None:
    """Raises CancelledError at Ctrl-C, between two steps of the loop and not in the midst of one."""
    task = asyncio.ensure_future(work)
    with suppress(NotImplementedError):  # Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    await task


def _body(row: Row, drawn: bool, max_new_tokens: int | None, seed: int) -> dict[str, Any]:
    """What a row asks, with what it leaves to us: how many tokens, and where chance starts."""
    body = {**row.body, "model": "gemmakit"}
    if row.url == "/v1/embeddings":
        return body
    limit = max_new_tokens or (o.DEFAULT_NEW_TOKENS if row.short else None)
    name = "max_output_tokens" if row.url == "/v1/responses" else "max_tokens"
    if limit is not None and not {name, "max_completion_tokens"} & set(body):
        body[name] = limit
    if body.get("seed") is None and _is_drawn(body, drawn):
        # From its id, so that a row draws alike wherever it stands and whatever ran before.
        digest = hashlib.sha256(f"{seed} {row.custom_id}".encode("utf-8", "backslashreplace")).digest()
        body["seed"] = int.from_bytes(digest[:8], "big") % MAX_SEED
    return body


def _is_drawn(body: Mapping[str, Any], drawn: bool) -> bool:
    if body.get("temperature") == 0:
        return False
    return drawn or any(body.get(name) is not None for name in SAMPLING)


def _digest(source: str, revision: str | None) -> str:
    """What tells a model from another of the same name."""
    folder = local_directory(source)
    if folder is not None:
        return sampled_digest(path for path in folder.rglob("*") if path.is_file())[:16]
    file = packaged_model(source) or Path(source).expanduser()
    if file.is_file():
        return sampled_digest([file])[:16]
    config = find_file(source, "config.json", HubOptions(revision=revision))
    return (commit_of(config) if config is not None else None) or "unknown"


class _Told:
    """Tells how far a run is: a bar on a terminal, a line now and then elsewhere, and a line at the end."""

    def __init__(self, run: Run):
        self.run, self.start, self.before = run, time.monotonic(), run.done
        self._spoke = self.start
        self._bar = progress_bar("items")

    def __enter__(self) -> _Told:
        self._tell = self._bar.__enter__()
        return self

    def __call__(self) -> None:
        run, now = self.run, time.monotonic()
        if self._tell is not None:
            self._tell(run.done, run.asked.rows, self._rates(now))
        elif now - self._spoke > SPEAK_EVERY_S:
            self._spoke = now
            left = (run.asked.rows - run.done) * (now - self.start) / max(1, run.done - self.before)
            note(f"{run.done:,} of {run.asked.rows:,} rows, {self._rates(now)}, {left:,.0f} s left")

    def _rates(self, now: float) -> str:
        seconds = max(now - self.start, 1e-9)
        return f"{(self.run.done - self.before) / seconds:,.1f} rows/s, {self.run.tokens / seconds:,.0f} tokens/s"

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._bar.__exit__(kind, *error)
        if kind is None:
            run = self.run
            failed = f", {len(run.failed_lines):,} errors in {run.errors}" if run.failed_lines else ""
            note(f"{len(run.done_ids):,} answers in {run.output.path}{failed}; {self._rates(time.monotonic())}")
