"""The chat page: one file, sent with a policy that lets it run its own script and ask this server, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()


@router.get("/", include_in_schema=False)
def chat_page() -> HTMLResponse:
    html = _html()
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


@cache
def _html() -> str:
    return Path(__file__).with_name("index.html").read_text(encoding="utf-8")


def content_security_policy(html: str) -> str:
    """Allows the page's own script and style, by their digests, and requests to where it came from.

    No string becomes HTML or code, whoever wrote it: trusted types are required and none can be made.
    """
    return "; ".join([
        "default-src 'none'",
        f"script-src {_digests(html, 'script')}",
        f"style-src {_digests(html, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ])  # fmt: skip


def _digests(html: str, tag: str) -> str:
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)
