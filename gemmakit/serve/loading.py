"""From a name to a worker that answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmakit.errors import InputError
from gemmakit.pipelines import EmbeddingModel, pipeline
from gemmakit.pytorch.decode.batch import BatchEngine
from gemmakit.serve.metrics import Metrics
from gemmakit.serve.served import ServedModel
from gemmakit.serve.service import Service
from gemmakit.serve.worker import Worker


@dataclass(frozen=True)
class Loading:
    """What to load and how. options: of from_pretrained; engine: of BatchEngine; context: tokens, None for all."""

    source: str
    names: tuple[str, ...]
    options: Mapping[str, Any]
    context: int | None
    engine: Mapping[str, Any]

    def open(self, service: Service) -> None:
        """Fill a service. Raises what loading raises, and InputError for a context that the model does not have."""
        service.metrics = Metrics(self.names[0])
        if (Path(self.source) / "modules.json").is_file():
            embedder = EmbeddingModel.from_pretrained(self.source, **self.options)
            service.open(ServedModel(self.names, embedder=embedder), Worker(None))
            return
        pipe = pipeline("text-generation", self.source, **self.options)
        positions = pipe.model.config.max_position_embeddings
        if self.context is not None and self.context > positions:
            raise InputError(f"--context is {self.context}, but the model has {positions} positions.")
        engine = BatchEngine(pipe.model, **self.engine)
        pool = engine.scheduler.pool
        room = min(self.context or positions, pool.pages * pool.page_size)
        service.open(ServedModel(self.names, pipe, room=room), Worker(engine, [service.metrics]))
