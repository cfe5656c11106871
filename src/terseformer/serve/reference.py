"""The page at `/docs`: what may be asked and answered, made of the application's own description."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from fastapi import APIRouter, Request, Response
from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup, escape

from terseformer.serve.page import html

_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "minLength": "length at least",
    "maxLength": "length at most",
    "minItems": "at least",
    "maxItems": "at most",
}
router = APIRouter()


@router.get("/docs", include_in_schema=False)
async def reference(request: Request) -> Response:
    """The page."""
    return html(_template().render(request.app.openapi()))


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("terseformer", "serve"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": _prose, "kind": _kind}
    return environment.get_template("reference.html")


def _prose(text: str) -> Markup:
    """A docstring, in which names stand between backquotes."""
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(text))))


def _kind(schema: Mapping[str, Any]) -> Markup:
    """Which values a schema allows, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#{0}">{0}</a>').format(name)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return Markup(" or ").join(map(_kind, schema[key]))
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return Markup(" or ").join(Markup("<code>{}</code>").format(json.dumps(value)) for value in values)
    bounds = [f"{words} {schema[key]:,}" for key, words in _BOUNDS.items() if key in schema]
    kind = schema.get("type", "anything")
    items = Markup(" of {}").format(_kind(schema["items"])) if kind == "array" and schema.get("items") else ""
    return Markup(", ").join([escape(kind) + items, *bounds])
