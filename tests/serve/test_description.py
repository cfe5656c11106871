"""The server does what its OpenAPI description says, whatever is asked; and the page of it loads nothing."""

from __future__ import annotations

import json

import pytest
import schemathesis
from bs4 import BeautifulSoup
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from served import ServerProcess
from terseformer.serve.requests import ChatRequest, CompletionRequest

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_as_described(mode: GenerationMode, server: ServerProcess) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")

    @settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schema.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):  # else no case would come so far
            short = {"max_tokens": 2} if case.body.get("max_tokens") is None else {}
            case.body |= {"model": "small"} | short
        case.call_and_validate(checks=CHECKS)

    ask()
    assert 'status="500"' not in server.get("/metrics")


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
