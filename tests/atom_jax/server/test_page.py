"""The page at / in headless Chromium: a chat, its end, an error, and the metrics."""

import re
import shutil

import pytest

from tests.atom_jax.server.fake import until

playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install 'atom-jax[browser]'")

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = next(filter(None, map(shutil.which, _NAMES)), None) or shutil.which(own)
        if found is None:
            pytest.skip(f"needs Chromium: none of {', '.join(_NAMES)} is on the path, nor playwright's own")
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, serve):
    """``open_page(...)``: the page of a server with these settings, the server, and what went wrong in it."""
    pages = []

    def start(**changes):
        server = serve(**changes)
        page = browser.new_page()
        pages.append(page)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(server.url) or wrong.append(request.url))
        page.set_default_timeout(300_000)
        page.goto(server.url)
        return page, server, wrong

    yield start
    for page in pages:
        page.close()


def say(page, text, tokens=8):
    page.evaluate(f"document.getElementById('tokens').value = {tokens}")  # behind the closed settings
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def wait_for(page, selector, text):
    """Until the last element of ``selector`` has a text that matches."""
    playwright.expect(page.locator(selector).last).to_have_text(re.compile(text), timeout=300_000)


def wait_until_answered(page):
    playwright.expect(page.locator("#send")).to_be_visible(timeout=300_000)


SAID = "#log .assistant .text"


def test_chat_and_metrics(open_page):
    page, _, wrong = open_page()
    wait_for(page, "#model", "tiny")
    say(page, "the <b>tin</b>")
    wait_for(page, SAID, "^[a-z]{8}$")
    assert page.inner_text("#log .user") == "the <b>tin</b>"
    wait_until_answered(page)
    wait_for(page, "#log .speed", "^8 tokens · .* tokens/s · first after .* s$")
    say(page, "more", tokens=5)
    wait_for(page, SAID, "^[a-z]{5}$")
    wait_for(page, "#totals", "Tokens written13")
    wait_for(page, "#state", "^ok$")
    assert wrong == []


def test_chats_are_kept(open_page):
    page, server, wrong = open_page()
    for text in ("first question", "second question"):
        page.click("#new")
        say(page, text)
        wait_until_answered(page)
    page.reload()
    assert page.inner_text("#log") == ""
    playwright.expect(page.locator("#list .open")).to_have_text(["second question", "first question"])
    page.click("#list .open >> text=first question")
    wait_for(page, "#log .user", "first question")
    said = page.inner_text(SAID)
    say(page, "and then?", tokens=3)
    wait_until_answered(page)
    assert server.service.engine.stats.generated_tokens == 8 + 8 + 3
    playwright.expect(page.locator(SAID)).to_have_text([said, re.compile("^[a-z]{3}$")])
    page.click("#list .remove >> nth=0")
    playwright.expect(page.locator("#list .open")).to_have_text(["first question"])
    page.reload()
    playwright.expect(page.locator("#list .open")).to_have_text(["first question"])
    assert wrong == []


def test_code_is_set_apart(open_page):
    page, _, wrong = open_page()
    message = {"role": "assistant", "content": "Try:\n```python\nx = '<b>'\n```\nDone."}
    chats = [{"title": "code", "messages": [message]}]
    page.evaluate("(chats) => localStorage.setItem('chats', JSON.stringify(chats))", chats)
    page.reload()
    page.click("#list .open")
    assert page.inner_text("#log pre").strip() == "x = '<b>'"
    assert "```" not in page.inner_text("#log")
    assert wrong == []


def test_plots_are_drawn_of_what_the_server_does(open_page):
    page, _, wrong = open_page()
    playwright.expect(page.locator("#plots canvas")).to_have_count(4)
    say(page, "a", tokens=40)
    wait_until_answered(page)
    wait_for(page, "#plots h2 >> nth=0", "Tokens per second[1-9]")
    wait_for(page, "#plots h2 >> nth=1", r"Latencyfirst tokenlater tokens.* ms / .* ms")
    page.wait_for_function(
        """() => [...document.querySelectorAll("#plots canvas")].every((canvas) => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return data.some((value) => value !== 0);
        })"""
    )
    assert wrong == []


def test_colours(open_page):
    page, _, wrong = open_page()
    back = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(back)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(back)
    assert dark != light
    for expected in (light, dark, light):  # light, dark, and again as the system has it
        page.click("#theme")
        assert page.evaluate(back) == expected
    page.click("#theme")
    page.click("#theme")
    page.reload()
    assert page.evaluate(back) == dark
    assert wrong == []


def test_on_a_phone(open_page):
    page, _, wrong = open_page()
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for panel in ("#chats", "#plots"):
        playwright.expect(page.locator(panel)).to_be_hidden()
    page.click("#show-plots")
    playwright.expect(page.locator("#plots")).to_be_visible()
    page.click("#show-chats")
    playwright.expect(page.locator("#plots")).to_be_hidden()
    page.click("#new")
    playwright.expect(page.locator("#chats")).to_be_hidden()
    say(page, "hello", tokens=5)
    wait_for(page, SAID, "^[a-z]{5}$")
    assert wrong == []


def test_stop_frees_the_pages(open_page, engine):
    engine.pause_after = 3
    page, _, wrong = open_page()
    say(page, "a", tokens=60)
    wait_for(page, SAID, "^[a-z]{3}$")
    page.click("#stop")
    wait_until_answered(page)
    until(lambda: engine.aborted == 1 and not engine.requests)
    wait_for(page, SAID, "^[a-z]{3}$")
    assert wrong == []


def test_errors_are_shown_and_the_key_is_sent(open_page):
    page, _, wrong = open_page(api_keys=("hunter2",))
    wait_for(page, "#log .error", "API key")
    page.evaluate("document.getElementById('key').value = 'hunter2'")
    say(page, "a", tokens=1000)
    wait_for(page, "#log .error", "maximum context length")
    wait_until_answered(page)
    assert page.input_value("#prompt") == "a", "what was not answered can be sent again"
    assert page.locator("#list li").count() == 0
    say(page, "a", tokens=3)
    wait_for(page, SAID, "^[a-z]{3}$")
    assert wrong == []
