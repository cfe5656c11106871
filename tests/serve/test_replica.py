"""The application as a replica: what its front hands on of a client's key."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from served import PROMPT
from terseformer.serve.limits import Caching, Limits
from terseformer.serve.replica import Replica


def test_a_replica_tells_no_key_what_another_has_asked(runs: Path) -> None:
    """Its front has checked the key, and hands on a digest."""
    folders = {"small": runs / "small"}
    replica = Replica(folders, Limits(), Caching(cache_memory=64, cache_disk=0), dtype="f32", threads=1)
    body = json.dumps({"model": "small", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}).encode()

    async def cached(key: bytes) -> int:
        scope: dict[str, Any] = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions"}
        scope |= {"raw_path": b"/v1/completions", "query_string": b"", "root_path": "", "scheme": "http"}
        scope |= {"headers": [(b"content-type", b"application/json")], "client": ("1.2.3.4", 1), "terse.key": key}
        messages = [message async for batch in replica.answer(scope, body) for message in batch]
        assert messages[0]["status"] == 200
        answer = json.loads(b"".join(message.get("body", b"") for message in messages[1:]))
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def run() -> None:
        assert await cached(b"one") == 0
        assert await cached(b"one") > 0
        assert await cached(b"two") == 0

    try:
        asyncio.run(run())
    finally:
        replica.close()
