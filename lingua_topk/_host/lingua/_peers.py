"""What an error says of the other processes of a run: that one is gone, or silent.

A collective cannot go on without any of them, and torch tells so in as many ways as it has
transports, where it happens to wait: within a step, a save, or the library's own exchange.

apps.topk uses this module on both hosts, under its name within lingua_topk: it needs nothing
else of the host.
"""

import re
from collections.abc import Iterator

TIMEOUT_NAME = "LINGUA_TOPK_TIMEOUT"
_TORCH_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"}
# gloo raises a bare RuntimeError; these are words of its own alone.
_GLOO = re.compile(
    r"gloo/|Connection (closed|reset) by peer|Timed out waiting \d+ms for (send|recv) operation"
)
_SOURCE = re.compile(r"\[[^\]]*\.cc:\d+\] ")  # where in gloo's own source
_LONGEST = 200  # characters of it that are shown


def lost_peer(error: BaseException) -> str | None:
    """A line for the user where `error` came of a lost process; None for any other error."""
    for one in _chain(error):
        is_of_torch = type(one).__name__ in _TORCH_TYPES
        if is_of_torch or (isinstance(one, RuntimeError) and _GLOO.search(str(one))):
            return _told(_SOURCE.sub("", str(one)))
    return None


def _told(reason: str) -> str:
    reason = " ".join(reason.partition("This is typically caused by")[0].split())[:_LONGEST]
    waits = "imed out" in reason or "timeout" in reason
    more = f" ({TIMEOUT_NAME} says how many seconds one waits for another)" if waits else ""
    return (
        f"another process of this run has ended or cannot be reached ({reason.rstrip('. ')}){more}:"
        " what it said itself stands above or in the other node's log; start the same command"
        " again, and it goes on from what was saved last"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came of; torch's checkpoints hold what each process met."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or one in seen:
            continue
        seen.append(one)
        yield one
        failures = getattr(one, "failures", None)
        waiting += [met for met, _ in failures.values()] if isinstance(failures, dict) else []
        waiting.append(one.__cause__)
