"""The page in a real browser: by keyboard, in light and dark, on a phone's width, and with nobody but its server.

It needs Debian's `chromium`, or another Chromium in the path; without one, this file is skipped and says so.
"""

from __future__ import annotations

import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from served import PROMPT, ServerProcess
from terseformer.engine import Engine
from terseformer.sampling import SamplingConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium; on Debian: apt-get install chromium", allow_module_level=True)

QUIET = [f"--disable-{what}" for what in ("gpu", "quic", "background-networking", "component-update", "sync")]
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=24)
OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, as whom CI runs; it sees this project's page alone.
        arguments = {"chromium_sandbox": False, "args": ["--no-first-run", *QUIET]}
        browser = playwright.chromium.launch(executable_path=CHROMIUM, **arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens a server's page, which must ask no other host, and complain of nothing but what is `expected`."""
    opened = []

    def open_page(server: ServerProcess, expected: str = "", **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(30_000)
        page = context.new_page()
        asked, complaints = set(), []
        page.on("request", lambda request: asked.add(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        opened.append((context, server, expected, asked, complaints))
        page.goto(server.url)
        return page

    yield open_page
    for context, server, expected, asked, complaints in opened:
        context.close()
        assert asked
        assert all(url.startswith((f"{server.url}/", "data:")) for url in asked)
        assert not [text for text in complaints if not expected or expected not in text]


def write(page: Page, prompt: str = PROMPT, **sampling: float) -> str:
    """Writes by keyboard alone; gives the text when it is whole."""
    expect(page.locator("#about")).to_contain_text("parameters")
    if sampling:
        page.get_by_text("Sampling").press("Enter")
        for name, value in sampling.items():
            page.locator(f"[name={name}]").fill(str(value))
    expect(page.locator("#prompt")).to_be_editable()
    page.locator("#prompt").focus()
    page.keyboard.type(prompt)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("tokens in")
    return page.locator("#output .reply").last.text_content()


def pixels(page: Page) -> str:
    return page.locator("#picture").evaluate("canvas => canvas.toDataURL()")


def test_a_text_is_the_engines_and_its_speed_is_shown(
    open_page: OpenPage, server: ServerProcess, engine: Engine
) -> None:
    page = open_page(server)
    expect(page.locator("#prompt")).to_be_focused()
    text = write(page, temperature=0, max_tokens=24)
    (expected,) = engine.generate(PROMPT, GREEDY)
    assert text == expected.text
    expect(page.locator("#output")).to_have_text(PROMPT + text)
    expect(page.locator("#count")).to_have_text(str(len(expected.token_ids)))
    expect(page.locator("#rate")).to_have_text(re.compile(r"^[\d,]+$"))
    expect(page.locator("#first")).to_have_text(re.compile(r"^[\d,]+ ms$"))
    expect(page.locator("#bars")).to_have_text(re.compile(r"^This model[\d.]+ kB$"))  # so small a one has no twin


def test_the_picture_shows_each_tokens_units(open_page: OpenPage, server: ServerProcess, engine: Engine) -> None:
    page = open_page(server)
    page.locator("#picture").wait_for()
    blank = pixels(page)
    write(page, temperature=0, max_tokens=24)
    last = pixels(page)
    assert last != blank
    writer = engine.start(engine.new_session(), engine.tokenizer.encode(PROMPT).ids, GREEDY, trace=True)
    engine.write([writer])
    touched = engine.touched(writer)
    num_read = len(touched.chosen)
    expect(page.locator("#token-label")).to_contain_text(f"Token {num_read} of {num_read + 1}")
    page.locator("#token").press("Home")
    expect(page.locator("#token-label")).to_contain_text(f"Token 1 of {num_read + 1}")
    assert pixels(page) not in (blank, last)
    above = touched.active[0].sum()
    expect(page.locator("#share")).to_contain_text(f"It touched 8 of 64 units, 13 %; {above} were above zero.")
    page.locator("#picture").press("ArrowRight")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    so_far = len(set(touched.chosen[:, 1, 2]))
    expect(page.locator("#cell")).to_contain_text(
        f"Layer 2, block 3: this token chose number {touched.chosen[0, 1, 2] + 1} of 8"
    )
    expect(page.locator("#cell")).to_contain_text(f"{so_far} of them were touched so far")
    expect(page.locator("#spot")).to_be_visible()
    token = page.locator("#output .token:not(:empty)").nth(2)
    token.hover()
    expect(page.locator("#token-label")).to_contain_text(f"Token {int(token.get_attribute('data-index')) + 1} of")
    expect(token).to_have_class("token on")
    page.locator("#picture").hover(position={"x": 30, "y": 5})
    expect(page.locator("#cell")).to_contain_text("Layer 1, block 1")


def test_a_chat_goes_on(open_page: OpenPage, server: ServerProcess) -> None:
    page = open_page(server)
    expect(page.locator("#about")).to_contain_text("parameters")
    page.locator("[value=completion]").press("ArrowRight")
    first = write(page, "abc def", seed=1)
    page.keyboard.type("ghi")
    with page.expect_request("**/chat/completions") as asked:
        page.keyboard.press("Enter")
    messages = [("user", "abc def"), ("assistant", first), ("user", "ghi")]
    body = asked.value.post_data_json
    assert [(message["role"], message["content"]) for message in body["messages"]] == messages
    assert (body["seed"], body["terse"]) == (1, {"trace": True})
    expect(page.locator("#output .reply")).to_have_count(2)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#output")).to_be_empty()


def test_markup_in_a_text_stays_text(open_page: OpenPage, server: ServerProcess) -> None:
    page = open_page(server)
    write(page, prompt := "<img src=x onerror=alert(1)> <b>abc</b>")
    expect(page.locator("#output .said")).to_have_text(prompt)
    assert page.locator("#output :is(img, b)").count() == 0


def test_a_mistake_is_said_and_is_no_turn_of_a_chat(open_page: OpenPage, server: ServerProcess) -> None:
    page = open_page(server, expected="status of 400")
    expect(page.locator("#about")).to_contain_text("parameters")
    page.get_by_label("Chat").check()
    page.get_by_text("Sampling").press("Enter")
    page.locator("[name=temperature]").fill("3")
    page.locator("#prompt").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("temperature: Input should be less than or equal to 2")
    expect(page.get_by_role("button", name="Write")).to_be_enabled()
    page.locator("[name=temperature]").fill("1")
    with page.expect_request("**/chat/completions") as asked:
        write(page, "abc def")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "abc def"}]


@pytest.mark.slow
def test_a_text_is_stopped_and_a_key_asked_for(open_page: OpenPage, slow: Path) -> None:
    """By a model whose dense layers choose nothing, so that there is no picture."""
    with ServerProcess(slow, "--api-key", "secret") as server:
        page = open_page(server, expected="status of 401")
        page.get_by_label("Key of this server").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#about")).to_contain_text("parameters")
        expect(page.locator("#figure")).to_be_hidden()
        expect(page.locator("#whole")).to_be_visible()
        expect(page.locator("#bars")).to_have_text(re.compile(r"^This model([\d.]+ MB).*twin.*\1$"))
        page.get_by_text("Sampling").press("Enter")
        page.locator("[name=max_tokens]").fill("480")
        page.locator("#prompt").press("Enter")
        expect(page.locator("#count")).to_have_text(re.compile(r"^\d"))
        page.keyboard.press("Escape")
        expect(page.locator("#status")).to_contain_text("tokens in")
        assert int(page.locator("#count").text_content()) < 480
        expect(page.get_by_role("alert")).to_be_hidden()


def test_an_encoder_decoder_takes_a_source_and_no_turns(open_page: OpenPage, server: ServerProcess) -> None:
    page = open_page(server)
    expect(page.locator("#about")).to_contain_text("parameters")
    page.get_by_label("Model").select_option("pairs")
    expect(page.locator("#prompt-label")).to_have_text("Source")
    expect(page.locator("[value=chat]")).to_be_disabled()
    write(page, "abc def")
    expect(page.locator("#about")).to_contain_text("pairs: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_light_and_dark(scheme: str, open_page: OpenPage, server: ServerProcess) -> None:
    """Nothing is wider than the screen, all that can be pressed is large enough, and words can be told from paper."""
    page = open_page(server, color_scheme=scheme, viewport={"width": 360, "height": 740}, has_touch=True)
    write(page, max_tokens=100)
    assert page.locator("html").evaluate("html => html.scrollWidth") == 360
    for button in page.get_by_role("button").all():
        assert button.bounding_box()["height"] >= 40
    for name in ("body", ".small", ".said", "#share", "button.main", "#cell"):
        ink, paper = page.locator(name).first.evaluate(
            "element => { let at = element, paper; do { paper = getComputedStyle(at).backgroundColor; "
            "at = at.parentElement; } while (paper === 'rgba(0, 0, 0, 0)'); "
            "return [getComputedStyle(element).color, paper]; }"
        )
        assert contrast(ink, paper) >= 4.5, name
    dark = luminance(page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")) < 0.1
    assert dark == (scheme == "dark")


def luminance(colour: str) -> float:
    """Of `rgb(r, g, b)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_everything_has_a_name(open_page: OpenPage, server: ServerProcess) -> None:
    page = open_page(server)
    page.locator("#picture").wait_for()
    page.get_by_text("Sampling").click()
    for control in page.locator("main :is(input, textarea, select, button, canvas):visible").all():
        assert control.evaluate("control => control.labels?.[0]?.innerText || control.ariaLabel || control.innerText")


def test_nothing_but_the_page_itself_may_be_loaded(server: ServerProcess) -> None:
    with urllib.request.urlopen(server.url, timeout=30) as response:
        policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert all(policy[name].startswith("'sha256-") for name in ("script-src", "style-src"))
