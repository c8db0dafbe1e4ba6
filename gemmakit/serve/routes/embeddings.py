"""POST /v1/embeddings: texts to vectors."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any, cast

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor
from torch.nn.functional import normalize

from gemmakit.pipelines import EmbeddingModel
from gemmakit.serve.protocol import EmbeddingsRequest
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.served import ServedModel
from gemmakit.serve.service import service_of
from gemmakit.serve.worker import Worker

router = APIRouter(tags=["openai"])


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
    """The vectors of texts; of a model that generates, the mean of its hidden states where `pooling` asks for it."""
    service = service_of(request)
    served = service.ready(body.model)
    service.count_unknown(body)
    if served.embedder is None and body.pooling is None:
        said = 'this model generates; for the mean of its hidden states ask with "pooling": "mean".'
        raise Refusal(400, said, param="pooling", code="unsupported")
    several = isinstance(body.input, list) and not isinstance(body.input[0], int)
    inputs = cast("list[Any]", body.input if several else [body.input])
    vectors, tokens = await _in_turn(cast(Worker, service.worker), served, body, inputs)
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model or served.name, "usage": usage})


async def _in_turn(
    worker: Worker, served: ServedModel, body: EmbeddingsRequest, inputs: Sequence[Any]
) -> tuple[list[Tensor], int]:
    """A text a call to the engine's thread, so that others' tokens go on between two of them."""
    vectors, tokens = list[Tensor](), 0
    embed = _mean if served.embedder is None else _embedded
    for each in inputs:
        ids = await served.aside(_ids, served, each)
        tokens += len(ids)
        future = worker.call(lambda each=each, ids=ids: embed(served, body, each, ids))
        vectors.append(await asyncio.wrap_future(future))
    return vectors, tokens


def _ids(served: ServedModel, given: str | list[int]) -> list[int]:
    if served.embedder is not None:
        if not isinstance(given, str):
            raise Refusal(400, "this model embeds texts: give texts, not ids.", param="input")
        return served.tokenizer(given)["input_ids"]
    ids = served.encode_prompt(given)
    if len(ids) > served.context:
        said = f"the input has {len(ids)} tokens, but the context holds {served.context}. Send less at a time."
        raise Refusal(400, said, param="input", code="context_length_exceeded")
    wrong = next((token for token in ids if token >= served.vocabulary), None)
    if wrong is not None:
        raise Refusal(400, f"token id {wrong} is outside the vocabulary of {served.vocabulary} ids.", param="input")
    return ids


def _embedded(served: ServedModel, body: EmbeddingsRequest, text: str, ids: list[int]) -> Tensor:
    embedder = cast(EmbeddingModel, served.embedder)
    options: dict[str, Any] = {
        "prompt_name": body.prompt_name,
        "truncate_dim": body.dimensions,
        "convert_to_numpy": False,
    }
    return embedder.encode(text, **options).cpu()


@torch.no_grad()
def _mean(served: ServedModel, body: EmbeddingsRequest, given: Any, ids: list[int]) -> Tensor:
    """The mean over the tokens, cut and then brought to length 1."""
    model = served.pipe.model
    if body.dimensions is not None and body.dimensions > model.config.hidden_size:
        said = f"dimensions is {body.dimensions}, but the vectors have {model.config.hidden_size}."
        raise Refusal(400, said, param="dimensions")
    rows = torch.tensor([ids], device=model.device)
    hidden = model.model(input_ids=rows, use_cache=False, return_dict=True)[0].float()
    return normalize(hidden[0].mean(0)[: body.dimensions], dim=0).cpu()


def _written(vector: Tensor, encoding: str | None) -> list[float] | str:
    """Numbers, or the same as little-endian float32 in base64, which OpenAI's client asks for of its own accord."""
    if encoding != "base64":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
