"""What all tests with a browser share."""

import pytest

from tests.report import browser as browsers


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        started = browsers.start(playwright)
        yield started
        started.close()
