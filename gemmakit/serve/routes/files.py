"""/v1/files: what batches read, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from gemmakit.serve.refusals import Refusal
from gemmakit.serve.service import owner_of, service_of

PATH = "/v1/files"
router = APIRouter(tags=["openai"])
After = Annotated[str | None, Query(max_length=512)]
Limit = Annotated[int, Query(ge=1, le=10_000)]
Expiry = Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2_592_000)]


@router.post(PATH)
async def create(
    request: Request,
    file: Annotated[UploadFile, File()],
    purpose: Annotated[Literal["batch"], Form()],
    expires_after: Expiry = None,
) -> dict[str, Any]:
    """Keep a file; its name is only told again."""
    store, name = service_of(request).kept(), file.filename or "file"
    if len(name) > 255 or not name.isprintable() or {"/", "\\"} & set(name) or name in (".", ".."):
        said = f"the file is called {name!r:.80}; a name has 1 to 255 characters that can be printed, and no slashes."
        raise Refusal(400, said, param="file")
    return await run_in_threadpool(store.add_file, owner_of(request), name, purpose, file.file, expires_after)


@router.get(PATH)
def listed(
    request: Request,
    after: After = None,
    limit: Limit = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """What the asker keeps, the newest first."""
    files = service_of(request).kept().files(owner_of(request))
    files = [file for file in files if purpose in (None, file["purpose"])]
    return page(files if order == "desc" else files[::-1], after, limit)


@router.get(f"{PATH}/{{file_id}}")
def retrieve(file_id: str, request: Request) -> dict[str, Any]:
    return found(service_of(request).kept().file, "file", file_id, request)


@router.get(f"{PATH}/{{file_id}}/content", response_class=StreamingResponse)
def content(file_id: str, request: Request) -> StreamingResponse:
    store = service_of(request).kept()
    found(store.file, "file", file_id, request)
    return StreamingResponse(store.content(file_id), media_type="application/octet-stream")


@router.delete(f"{PATH}/{{file_id}}")
def delete(file_id: str, request: Request) -> dict[str, Any]:
    store = service_of(request).kept()
    found(store.file, "file", file_id, request)
    reader = store.delete_file(file_id)
    if reader is not None:
        raise Refusal(400, f"{file_id} is read by {reader}: cancel it or wait for its end.", param="file_id")
    return {"id": file_id, "object": "file", "deleted": True}


def found(look: Callable[[str, str], dict[str, Any] | None], kind: str, name: str, request: Request) -> dict[str, Any]:
    """What the asker has by a name. Raises Refusal, also for what is another's."""
    has = look(owner_of(request), name)
    if has is None:
        raise Refusal(404, f"there is no {kind} {name!r:.80}.", param=f"{kind}_id", code="not_found")
    return has


def page(things: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A part of a list as OpenAI's clients walk it: what follows the one called `after`."""
    names = [thing["id"] for thing in things]
    start = names.index(after) + 1 if after in names else 0 if after is None else len(names)
    part = list(things[start : start + limit])
    ends = {"first_id": part[0]["id"], "last_id": part[-1]["id"]} if part else {"first_id": None, "last_id": None}
    return {"object": "list", "data": part, **ends, "has_more": start + limit < len(things)}
