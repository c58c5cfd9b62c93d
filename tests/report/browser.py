"""A browser to look at pages with."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

VARIABLE = "LINGUA_TOPK_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
HOW = (
    f"no browser: install chromium (apt-get install chromium), or set {VARIABLE} to one that is"
    " made from it"
)


def find(own: str) -> str:
    """The program to start; `own`: where playwright keeps its own. The test skips without one."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        assert Path(chosen).is_file(), f"{VARIABLE}={chosen} is no file"
        return chosen
    found = [path for path in map(shutil.which, NAMES) if path]
    found += [own] if Path(own).is_file() else []
    return found[0] if found else pytest.skip(HOW)


def start(playwright):
    """A headless browser. As root it runs without a sandbox, which it would refuse."""
    chromium = playwright.chromium
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    return chromium.launch(executable_path=find(chromium.executable_path), args=arguments)


@contextmanager
def opened(browser, file, hash="", **settings):
    """A tab with the page; in the end nothing was asked of anyone, and nothing went wrong."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"file://{file}{hash}")
    tab.wait_for_selector("main > section:not([hidden])")
    tab.set_default_timeout(5000)
    yield tab
    context.close()
    assert said == []
    assert {url.partition("#")[0] for url in asked} - {"data:,"} == {f"file://{file}"}


def visit(tab, hash):
    """Another part of the same page."""
    tab.evaluate("hash => { location.hash = hash; }", hash)
    view = hash[1:].partition("/")[0] or "overview"
    tab.wait_for_selector(f"#view-{view}:not([hidden])")
