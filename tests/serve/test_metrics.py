"""What Prometheus is told."""

from __future__ import annotations

from pathlib import Path

from served import PROMPT, ServerProcess
from terseformer.accounting import feed_forward_units
from terseformer.engine import Engine


def test_metrics(runs: Path, engine: Engine) -> None:
    with ServerProcess(runs / "small") as server:
        done = server.client().completions.create(model="small", prompt=PROMPT, max_tokens=20, n=2)
        written, prompt = done.usage.completion_tokens, done.usage.prompt_tokens
        assert server.metric("terse_completion_tokens_total") == written
        assert server.metric("terse_prompt_tokens_total") == prompt
        read, stored = feed_forward_units(engine.config)
        assert (read, stored) == (2 * 4, 2 * 32)
        assert server.metric("terse_feed_forward_units_read_total") == written * read
        assert server.metric("terse_feed_forward_units_passed_total") == written * stored
        assert server.metric("terse_time_to_first_token_seconds_count") == 1
        assert server.metric("terse_request_seconds_count") == 1
        assert server.metric("terse_request_tokens_per_second_count") == 1
        assert server.metric("terse_running_texts") == 0
        assert server.metric("terse_waiting_requests") == 0
        page = server.get("/metrics")
        assert 'terse_requests_total{route="/v1/completions",status="200"} 1.0' in page
        assert server.metric("terse_requests_total") >= 9
