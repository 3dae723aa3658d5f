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
    page.click("#send")


def wait_for(page, selector, text):
    """Until the last element of ``selector`` has a text that matches."""
    playwright.expect(page.locator(selector).last).to_have_text(re.compile(text), timeout=300_000)


def wait_until_answered(page):
    playwright.expect(page.locator("#send")).to_be_enabled(timeout=300_000)


def test_chat_and_metrics(open_page):
    page, _, wrong = open_page()
    wait_for(page, "#model", "tiny")
    say(page, "the <b>tin</b>")
    wait_for(page, "#log p.assistant", "^[a-z]{8}$")
    assert page.inner_text("#log p.user") == "the <b>tin</b>"
    wait_until_answered(page)
    say(page, "more", tokens=5)
    wait_for(page, "#log p.assistant", "^[a-z]{5}$")
    wait_for(page, "#metrics", "tokens generated13")
    assert wrong == []


def test_stop_frees_the_pages(open_page, engine):
    engine.pause_after = 3
    page, _, wrong = open_page()
    say(page, "a", tokens=60)
    wait_for(page, "#log p.assistant", "^[a-z]{3}$")
    page.click("#stop")
    wait_until_answered(page)
    until(lambda: engine.aborted == 1 and not engine.requests)
    assert wrong == []


def test_errors_are_shown_and_the_key_is_sent(open_page):
    page, _, wrong = open_page(api_keys=("hunter2",))
    wait_for(page, "#log p.error", "API key")
    page.evaluate("document.getElementById('key').value = 'hunter2'")
    say(page, "a", tokens=1000)
    wait_for(page, "#log p.error", "maximum context length")
    wait_until_answered(page)
    say(page, "a", tokens=3)
    wait_for(page, "#log p.assistant", "^[a-z]{3}$")
    assert wrong == []
