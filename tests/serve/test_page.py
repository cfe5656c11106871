"""The page in a real browser: by keyboard, in light and dark, on a phone's width, and with nobody but its server.

It needs Debian's `chromium`, or another Chromium in the path; without one, this file is skipped and says so.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from runs import SPARSE
from served import ServerProcess
from terseformer.engine import Engine
from terseformer.sampling import SamplingConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed; on Debian: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

QUIET = [f"--disable-{what}" for what in ("gpu", "quic", "background-networking", "component-update", "sync")]
PROMPT = "abc def ghi <b>jab</b>"
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=24)
PIXELS = "() => { const c = document.querySelector('canvas'); return c.toDataURL(); }"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, as which CI runs; it sees this project's page alone.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, chromium_sandbox=False, args=["--no-first-run", *QUIET]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a server's page; at the end, it must have asked no other host and have complained of nothing."""
    contexts, hosts, complaints = [], set(), []

    def watch(page: Any, expected: str) -> None:
        page.on("request", lambda request: hosts.add(re.split("[/?#]", request.url.removeprefix("http://"))[0]))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))

    def open_page(server: ServerProcess, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        ...
