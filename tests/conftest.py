"""The suite runs on the embedded host; tests/host_contract starts others in subprocesses."""

import os

os.environ["LINGUA_TOPK_HOST"] = "embedded"

import pytest

import apps  # noqa: F401  (binds `lingua` before a test imports it)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: give --long"))
