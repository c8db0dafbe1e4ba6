"""What a client is told when it gets no answer: one form, {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as RoutingException

from gemmakit.errors import GemmakitError, InputError, PromptTooLong, TokenizerError

log = logging.getLogger("gemmakit.serve")
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    503: "overloaded_error",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Refusal(HTTPException):
    """An answer that is an error. param: the field at fault; code: for programs.

    FastAPI lets its own kind of exception through, also from under the reading of a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        status = self.status_code
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"type": "error", "error": error}  # the outer type is what Anthropic's clients look for

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def refusal_of(error: BaseException) -> Refusal:
    """What to tell of an exception; nothing of its own words where it is a mistake of ours."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, PromptTooLong):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, InputError | TokenizerError):
        return Refusal(400, str(error))
    if isinstance(error, GemmakitError):
        return Refusal(500, str(error), code=type(error).__name__)
    if isinstance(error, sqlite3.Error):
        said = "the state cannot be read or written: is the disk full? Nothing was changed."
        return Refusal(503, said, code="storage")
    return Refusal(500, "the server failed; its log says why.", code="internal_error")


def _invalid(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong, with the field's path: messages[0].role."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON: {first['ctx']['error']}.", code="invalid_json")
    what = f"{name}: {first['msg']}" if name else f"the body: {first['msg']}"
    return Refusal(400, f"{what}.", param=name or None)


def answer_errors(app: FastAPI) -> None:
    """Every error of a route leaves as a refusal."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        refusal = refusal_of(error)
        if refusal.status_code == 500 or isinstance(error, sqlite3.Error):
            log.error("%s failed", request.url.path, exc_info=error)
        return refusal.response()

    async def invalid(request: Request, error: Any) -> JSONResponse:
        return _invalid(error).response()

    async def http(request: Request, error: Any) -> JSONResponse:
        said = f"there is no {request.url.path}" if error.status_code == 404 else str(error.detail)
        return Refusal(error.status_code, said, headers=error.headers).response()

    for kind in (Refusal, GemmakitError, sqlite3.Error, Exception):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(RoutingException, http)
