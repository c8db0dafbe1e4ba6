"""/v1/batches: a file of requests, answered when there is room."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Request
from pydantic import Field, StringConstraints

from gemmakit.serve.feeder import ENDED, Feeder
from gemmakit.serve.protocol import Body, Name
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.routes.files import After, Limit, found, page
from gemmakit.serve.service import owner_of, service_of

PATH = "/v1/batches"
router = APIRouter(tags=["openai"])
SECONDS = {"m": 60, "h": 3600, "d": 86400}


class Expiry(Body):
    anchor: Literal["created_at"] = "created_at"
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class BatchRequest(Body):
    input_file_id: Name
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,3}[mhd]$")] = "24h"
    metadata: (
        Annotated[
            dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: Expiry | None = None


@router.post(PATH)
async def create(body: BatchRequest, request: Request) -> dict[str, Any]:
    """Begin a batch. completion_window: 24h, or another number of m, h, d; what is not answered by then expires."""
    service = service_of(request)
    service.count_unknown(body)
    store = service.kept()
    found(store.file, "file", body.input_file_id, request)
    number, unit = cast("re.Match[str]", re.match(r"(\d+)(.)", body.completion_window)).groups()
    said = body.model_dump(include=set(BatchRequest.model_fields) - {"input_file_id"})
    made = store.add_batch(owner_of(request), body.input_file_id, int(number) * SECONDS[unit], said)
    cast(Feeder, service.feeder).wake()
    return made


@router.get(PATH)
def listed(request: Request, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """What the asker began, the newest first."""
    return page(service_of(request).kept().batches(owner_of(request)), after, limit)


@router.get(f"{PATH}/{{batch_id}}")
def retrieve(batch_id: str, request: Request) -> dict[str, Any]:
    return found(service_of(request).kept().batch, "batch", batch_id, request)


@router.post(f"{PATH}/{{batch_id}}/cancel")
async def cancel(batch_id: str, request: Request) -> dict[str, Any]:
    """End a batch; what is done is kept."""
    service = service_of(request)
    store = service.kept()
    batch = found(store.batch, "batch", batch_id, request)
    if batch["status"] in ENDED:
        raise Refusal(400, f"{batch_id} is {batch['status']}; there is nothing to cancel.", param="batch_id")
    store.set_status(batch_id, "cancelling", unless=ENDED)
    cast(Feeder, service.feeder).cancel(batch_id)
    return found(store.batch, "batch", batch_id, request)
