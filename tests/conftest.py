"""The suite runs on the embedded host; tests/host_contract starts others in subprocesses."""

import gc
import logging
import os
import signal

os.environ["LINGUA_TOPK_HOST"] = "embedded"

import pytest

import apps  # noqa: F401  (binds `lingua` before a test imports it)


@pytest.fixture(autouse=True)
def undisturbed():
    """A program that runs in this process takes over log and signal handlers; here they return.

    Also after one that ran in a fixture of a wider scope: a test begins with pytest's handlers.
    """
    root, numbers = logging.getLogger(), (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    handlers = [one for one in root.handlers if type(one).__module__.startswith("_pytest")]
    root.handlers[:] = handlers
    root.setLevel(logging.WARNING)  # unlike root.level = ..., also for loggers that remember it
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    root.handlers[:] = handlers
    root.setLevel(logging.WARNING)


def pytest_collection_finish(session):
    """What is imported and collected stays to the end: no collection of garbage looks at it again.

    Each of the many trainings in this process collects several times.
    """
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: give --long"))
