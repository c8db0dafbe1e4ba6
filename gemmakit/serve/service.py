"""What the routes share: the model once it is loaded, its worker, and whether new work is taken."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fastapi import Request
from starlette.datastructures import State

from gemmakit.errors import InputError, QueueFull
from gemmakit.pipelines import EmbeddingModel, pipeline
from gemmakit.pytorch.adapters import load_adapters
from gemmakit.pytorch.decode import batch
from gemmakit.pytorch.parallel.lockstep import LeadingEngine, follow
from gemmakit.serve.conversation import (
    Reader,
    ToolChoice,
    ToolUse,
    chosen_tools,
    plain_messages,
    template_variables,
)
from gemmakit.serve.feeder import Feeder
from gemmakit.serve.generation import SHAPES, Answers, make_request, shape_of
from gemmakit.serve.metrics import Metrics
from gemmakit.serve.protocol import Body, Message, ResponseFormat, Sampling, Tool
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.served import ServedModel
from gemmakit.serve.settings import ServeSettings
from gemmakit.serve.shapes import Shapes
from gemmakit.serve.store import Store
from gemmakit.serve.worker import Worker
from gemmakit.text.response import ResponseParser

# Names of unknown fields that are counted each by itself; a client can make up any number.
MAX_NAMES = 64
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Loading:
    """What to load and how. options: of pipeline(); engine: of BatchEngine; context: tokens, None for all.

    adapters: name -> folder, of those that requests choose by naming them as their model.
    """

    source: str
    names: tuple[str, ...]
    options: Mapping[str, Any]
    context: int | None
    engine: Mapping[str, Any]
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])


class Service:
    """One model, its worker and counts: None while it loads; `draining` once the server is to end."""

    def __init__(self, settings: ServeSettings | None = None):
        self.settings = settings or ServeSettings()
        self.model: ServedModel | None = None
        self.worker: Worker | None = None
        self.metrics: Metrics | None = None
        self.draining = False
        self.shapes = Shapes(self.settings.compile_s)
        self.unknown_fields: Counter[str] = Counter()
        self.store = None if self.settings.state is None else Store(self.settings.state)
        self.feeder: Feeder | None = None  # while the application runs

    def load(self, loading: Loading) -> None:
        """Open for requests. Raises what loading raises, and InputError for a context that the model does not have."""
        self.metrics = Metrics(loading.names[0])
        if both := sorted(loading.adapters.keys() & set(loading.names)):
            raise InputError(f"{both[0]!r} is the name of the model and of an adapter: --served-model-name another.")
        if (Path(loading.source) / "modules.json").is_file():
            if loading.adapters:
                raise InputError(f"{loading.source} gives embeddings, and adapters are of models that generate.")
            if "tp_plan" in loading.options:
                raise InputError(f"{loading.source} gives embeddings: it runs in one process, without --tensor.")
            if "assistant_model" in loading.options:
                raise InputError(f"{loading.source} gives embeddings, and --draft is for models that generate.")
            embedder = EmbeddingModel.from_pretrained(loading.source, **loading.options)
            self.model, self.worker = ServedModel(loading.names, embedder=embedder), Worker(None)
            return
        pipe = pipeline("text-generation", loading.source, **loading.options)
        positions = pipe.model.config.max_position_embeddings
        if loading.context is not None and loading.context > positions:
            raise InputError(f"--context is {loading.context}, but the model has {positions} positions.")
        if loading.adapters:
            load_adapters(pipe.model, loading.adapters)
        split = pipe.model.tensor_parallel is not None
        draft = pipe.options.get("assistant_model")  # which the pipeline has loaded
        engine = (LeadingEngine if split else batch.BatchEngine)(pipe.model, assistant_model=draft, **loading.engine)
        pool = engine.scheduler.pool
        room = min(loading.context or positions, pool.pages * pool.page_size)
        self.model = ServedModel(loading.names, pipe, room=room, adapters=tuple(loading.adapters))
        self.worker = Worker(engine, [self.metrics])

    @property
    def state(self) -> str:
        """ "ready", or why not: "loading", "draining", "failed"."""
        if self.worker is not None and self.worker.error is not None:
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self.worker is None else "ready"

    def ready(self, name: str | None = None) -> ServedModel:
        """The model, which clients may call `name`. Raises Refusal while there is none, or no work is taken."""
        if self.state != "ready":
            raise Refusal(503, f"the server is {self.state}.", code=self.state, headers={"Retry-After": "5"})
        model = cast(ServedModel, self.model)
        model.check_name(name)
        return model

    def has_room(self) -> bool:
        """Whether work that nobody waits for may begin: one place is left to whoever comes."""
        if self.state != "ready":
            return False
        worker = cast(Worker, self.worker)
        if worker.engine is None:
            return not worker.busy
        return worker.under_way < max(1, worker.engine.scheduler.max_batch_size - 1)

    def kept(self) -> Store:
        """Files and batches. Raises Refusal where the server keeps none."""
        if self.store is None:
            said = "this server keeps no files and no batches: start it with --state FOLDER."
            raise Refusal(404, said, code="no_state")
        return self.store

    def count_unknown(self, body: Body) -> None:
        for name in body.unknown:
            known = name in self.unknown_fields or len(self.unknown_fields) < MAX_NAMES
            self.unknown_fields[name[:64] if known else "(others)"] += 1

    async def answers(self, request: Request, requests: Sequence[batch.Request], **reading: Any) -> Answers:
        """Hand requests to the engine. Raises Refusal, and what `BatchEngine.add` raises. reading: of Answers."""
        for asked in requests:
            await self.shapes.check(self.ready(), asked.settings)
        answers = Answers(cast(Worker, self.worker), requests, self.settings.buffered_events, **reading)
        try:
            await answers.start()
        except QueueFull as error:
            raise Refusal(429, str(error), code="queue_full", headers={"Retry-After": str(RETRY_AFTER_S)}) from None
        request.state.answers = answers  # for the line in the log
        return answers

    async def chat(
        self,
        request: Request,
        body: Sampling,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice = None,
        parallel: bool = True,
        thinks: bool | None = None,
        response_format: ResponseFormat | None = None,
        **wanted: Any,
    ) -> Answers:
        """The answers to a conversation. thinks: whether the model is to think first. wanted: as in make_request."""
        served = self.ready()
        variables = template_variables(body.chat_template_kwargs, thinks, served.has_thinking)
        use = chosen_tools(tools, tool_choice, parallel, served.has_tools)
        prompt = await self.prompt(messages, use, variables)
        may_think = bool(variables.get("enable_thinking"))
        form = shape_of(response_format, {})
        shaped = any(getattr(body, name) is not None for name in SHAPES)  # an answer that the client describes itself
        grammar: str | None = None
        if use.forced is not None or not shaped:
            schema = form.get("json_schema")
            grammar = await served.aside(use.grammar, served.tokenizer, prompt, may_think, schema)
        if grammar is not None and use.forced is None:
            response_format = None  # the grammar holds it
        wanted |= {"response_format": response_format, "answer": grammar}
        one_call = use.told is not None and not parallel
        asked = self.make(request, body, prompt, chat=True, one_call=one_call, **wanted)

        def reader() -> Reader:
            parser = ResponseParser(served.tokenizer, prompt=prompt, calls=use.told is not None)
            return Reader(parser, parallel)

        return await self.answers(request, [asked], reader=reader)

    async def prompt(
        self, messages: Sequence[Message], use: ToolUse | None = None, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids of a conversation. use: of its tools; variables: what else its template is told."""
        served = self.ready()
        plain = plain_messages(messages, served.has_developer)
        return await served.aside(served.encode_chat, plain, None if use is None else use.told, variables)

    def make(self, request: Request, body: Sampling, prompt: list[int], **wanted: Any) -> batch.Request:
        """As make_request, with what the connection says: whose prefixes it shares, how long it may wait."""
        return make_request(
            self.ready(), body, prompt, salt=owner_of(request), deadline=self.settings.queue_s, **wanted
        )


def follow_first(loading: Loading) -> None:
    """Be one of the processes that share the model of the first's service, until that ends."""
    pipe = pipeline("text-generation", loading.source, **loading.options)
    follow(batch.BatchEngine(pipe.model, **loading.engine), pipe.tokenizer)


def service_of(request: Request) -> Service:
    return cast(State, request.app.state).service


def owner_of(request: Request) -> str:
    """Who asks, as far as keys tell: prefixes and files are shared among those who ask with the same key."""
    known: Any = getattr(request.state, "owner", None)  # of a row of a batch
    if known is not None:
        return known
    key: Any = getattr(request.state, "api_key", None)
    return "" if key is None else f"key {hashlib.sha256(key.encode()).hexdigest()}"
