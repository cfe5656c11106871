"""The page at `/`: one file. A browser may use its own style and script alone, and ask this server alone."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Response

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page."""
    text = _text()
    return Response(text, media_type="text/html; charset=utf-8", headers=_headers(text))


@cache
def _text() -> str:
    return (files("terseformer.serve") / "page.html").read_text(encoding="utf-8")


@cache
def _headers(text: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": _digest(text, "script"),
        "style-src": _digest(text, "style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _digest(text: str, tag: str) -> str:
    """The digest of what an element holds, by which a policy allows this one and no other."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
