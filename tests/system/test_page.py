"""The page in a real browser: a person chats, stops, attaches a text, reads the map."""

import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kvcast import SparseConfig
from kvcast.server.settings import ModelSettings
from served import serve

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt-get install chromium)")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
ANSWER = "article.assistant"
ANSWERED_MS = 90_000  # of a machine that does other things, too
expect.set_options(timeout=ANSWERED_MS)


@pytest.fixture(scope="module")
def served(smollm2):
    settings = dict(model=str(smollm2), model_alias="smollm2", n_ctx=2048, n_threads=2, n_threads_batch=2)
    with serve([ModelSettings(**settings, sparse=SparseConfig(budget=256))], api_key="secret") as it:
        yield it


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(served, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(ANSWERED_MS)
    requests, problems = [], []
    page.on("request", lambda request: requests.append(request.url))
    own = "Failed to load resource"  # Chromium's note on a status that the page speaks of itself
    page.on("console", lambda message: message.type == "error" and own not in message.text and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(served.url)
    page.get_by_label("This server wants an API key").fill("secret")
    page.get_by_role("button", name="Use it").click()
    yield page
    page.close()
    assert not problems
    assert {urlsplit(url).netloc for url in requests if not url.startswith("data:")} == {urlsplit(served.url).netloc}


def ask(page, question):
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")


def answered(page):
    page.get_by_role("button", name="Regenerate").wait_for()
    return page.locator(ANSWER).last.locator(".body").inner_text()


def test_a_person_chats(page):
    ask(page, "Name one animal.")
    assert answered(page)
    assert "tok/s" in page.locator(".tools").inner_text()
    ask(page, "Why <b>that</b> one?")
    page.locator(ANSWER).nth(1).wait_for()
    answered(page)
    assert page.locator("article.user .body").last.inner_text() == "Why <b>that</b> one?"

    page.get_by_role("button", name="Regenerate").click()
    answered(page)
    assert page.locator(ANSWER).count() == 2

    page.get_by_role("button", name="New conversation").click()
    assert page.locator("article").count() == 0
    page.reload()
    listed = page.get_by_role("navigation").get_by_role("listitem")
    listed.get_by_text("Name one animal.").click()
    assert page.locator("article").count() == 4
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete Name one animal.").click()
    assert listed.count() == 0 and page.locator("article").count() == 0


def test_an_answer_can_be_stopped(page, served):
    ask(page, "Write a very long story about a ship, with all details.")
    expect(page.locator(ANSWER)).to_contain_text(re.compile(".{40}", re.DOTALL))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".tools")).to_contain_text("stopped")
    expect(page.get_by_role("status")).to_have_text("")
    assert served.desk.proxy.current.live.snapshot()["state"] == "idle"
    assert page.evaluate("document.activeElement.id") == "question"


def test_a_text_is_attached_and_the_map_is_read(page, code, tmp_path):
    (tmp_path / "code.py").write_text(code[:4000])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    page.locator("#file").set_input_files([tmp_path / "code.py", tmp_path / "picture.png"])
    page.get_by_role("alert").get_by_text("“picture.png” is not UTF-8 text").wait_for()
    assert "about 1,000 tokens" in page.get_by_label("Attached files").inner_text()
    ask(page, "What does this program do? Explain at length.")
    page.get_by_text("Reading:", exact=False).wait_for()
    answered(page)
    assert "code.py" in page.locator("article.user").inner_text()

    page.locator("#maps").wait_for()
    figures = page.locator("#figures").inner_text()
    assert "of 2,048" in figures and "×" in figures and "%" in figures
    colours = page.evaluate(
        "() => { const c = document.getElementById('attended'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4 * i, 4 * i + 3).join())).size }"
    )
    assert colours > 3
    block = page.get_by_role("slider", name="Block of the context")
    block.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    page.get_by_role("heading", name="Block 3, tokens 48 to 63").wait_for()
    text = page.locator("#block pre").inner_text()
    assert text.strip() and text.strip()[:20] in code
    block.click(position={"x": 200, "y": 40})
    expect(page.locator("#block h2")).not_to_contain_text("Block 3,")


def test_what_goes_wrong_is_said(page, served, code, tmp_path):
    (tmp_path / "long.txt").write_text(code)
    page.locator("#file").set_input_files(tmp_path / "long.txt")
    expect(page.get_by_label("Attached files")).to_contain_text("the context holds 2,048")
    ask(page, "What?")
    page.get_by_role("alert").get_by_text("shorten it").wait_for()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Ask again").click()
    page.get_by_role("alert").get_by_text("The server does not answer").wait_for()


def test_screens(served, browser, code, tmp_path):
    """Also what a person would look at: out/page-*.png."""
    out = Path("out")
    out.mkdir(exist_ok=True)
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(ANSWERED_MS)
    page.add_init_script("localStorage.setItem('kvcast.key', 'secret')")
    page.goto(served.url)
    (tmp_path / "code.py").write_text(code[:4000])
    page.locator("#file").set_input_files(tmp_path / "code.py")
    ask(page, "What does this program do?")
    expect(page.locator(ANSWER)).to_contain_text(re.compile(".{400}", re.DOTALL))
    page.get_by_role("button", name="Stop").click()
    answered(page)
    page.locator("#attended").click(position={"x": 150, "y": 40})
    expect(page.locator("#block h2")).to_contain_text("Block")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": 1400, "height": 900})
        page.locator("#attended").wait_for()
        page.screenshot(path=out / f"page-{scheme}.png")
        page.set_viewport_size({"width": 390, "height": 800})
        expect(page.locator("#attended")).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_text("Map of the context").click()
        page.locator("#attended").wait_for()
        page.screenshot(path=out / f"page-narrow-{scheme}.png")
    page.close()
