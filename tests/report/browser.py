"""A browser to look at pages with."""

import os
import shutil
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
