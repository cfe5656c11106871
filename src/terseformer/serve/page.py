"""Pages for a browser, which may use a page's own style and script alone, and ask this server alone; the one at `/`."""

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
    return html(_text())


def html(text: str) -> Response:
    """A page as a response."""
    return Response(text, media_type="text/html; charset=utf-8", headers=_headers(text))


@cache
def _text() -> str:
    return (files("terseformer.serve") / "page.html").read_text(encoding="utf-8")


@cache
def _headers(text: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": _digests(text, "script"),
        "style-src": _digests(text, "style"),
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


def _digests(text: str, tag: str) -> str:
    """The digests of what a page's elements hold, by which a policy allows these and no others."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"
