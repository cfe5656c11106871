"""The server does what its OpenAPI description says, whatever is asked; and the page of it loads nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bs4 import BeautifulSoup
from hypothesis import HealthCheck, given, settings

from served import ServerProcess
from terseformer.serve.requests import ChatRequest, CompletionRequest


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_answer_is_as_described(mode: str, server: ServerProcess) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    described = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.unsupported_method,
    ]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")

    @settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schema.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):  # else no case would come so far
            short = {"max_tokens": 2} if case.body.get("max_tokens") is None else {}
            case.body |= {"model": "small"} | short
        case.call_and_validate(checks=described)

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
