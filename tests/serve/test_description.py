"""The server does what its OpenAPI description says, whatever is asked; and the page of it loads nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from bs4 import BeautifulSoup
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from served import ServerProcess
from terseformer.serve.requests import ChatRequest, CompletionRequest


@pytest.fixture(scope="module")
def description(server: ServerProcess) -> Any:
    config = schemathesis.Config.from_dict({"seed": 1})
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config)


SCHEMA = schemathesis.pytest.from_fixture("description")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]


@pytest.mark.slow
@SCHEMA.parametrize()
@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "small"
        case.body["max_tokens"] = min(case.body.get("max_tokens") or 2, 8) if "max_tokens" in case.body else 2
    case.call_and_validate(checks=CHECKS)


def test_the_page_names_every_field_and_loads_nothing(server: ServerProcess) -> None:
    page = BeautifulSoup(server.get("/docs"), "html.parser")
    assert not page.find_all(["script", "iframe", "img"])
    assert not [tag for tag in page.find_all(href=True) if not tag["href"].startswith(("#", "/openapi.json", "data:"))]
    sections = {tag["id"] for tag in page.find_all(id=True)}
    assert {tag["href"][1:] for tag in page.find_all("a", href=True) if tag["href"].startswith("#")} <= sections
    for path in json.loads(server.get("/openapi.json"))["paths"]:
        assert page.find("code", string=lambda text, path=path: text.endswith(f" {path}"))
    for kind in (CompletionRequest, ChatRequest):
        rows = page.find(id=kind.__name__).tbody or page.find(id=kind.__name__)
        meanings = {row.th.code.text: row.find_all("td")[-1].text for row in rows.find_all("tr") if row.th.code}
        assert set(meanings) == set(kind.model_fields)
        assert all(meanings.values())
