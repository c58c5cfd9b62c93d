"""What an error says of the other processes of a run: that one is gone, or silent.

A collective cannot go on without any of them, and torch tells so in as many ways as it has
transports, where it happens to wait: within a step, a save, or the library's own exchange.

apps.topk uses this module on both hosts, under its name within lingua_topk: it needs nothing
else of the host.
"""

import logging
import re
import sys
from collections.abc import Iterator

logger = logging.getLogger(__name__)

TIMEOUT_NAME = "LINGUA_TOPK_TIMEOUT"
_TORCH_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"}
# What a process sees of another that is gone; torch's errors without such words are one's own.
_GONE = re.compile(
    r"connection.{0,20} (closed|reset|refused|aborted)|lost connection|socket closed|broken pipe"
    r"|timed out|timeout|got 0 bytes|failed to (recv|connect)|connectFullMesh failed"
    r"|no route to host|network is (unreachable|down)|host is (unreachable|down)"
    r"|ncclRemoteError|remote process exited|communicator was aborted",
    re.IGNORECASE,
)
# One's own device, settings or addresses, whatever else is said of them.
_OWN = re.compile(
    r"ncclInvalidUsage|ncclInvalidArgument|ncclUnhandledCudaError|Cuda failure|out of memory"
    r"|Duplicate GPU|EADDRINUSE|address already in use|ifa != nullptr|unable to find (an )?address",
    re.IGNORECASE,
)
# gloo raises a bare RuntimeError: it is known by where in its source, or by words of its own alone.
_GLOO = re.compile(
    r"\[[^\]]*(third_party/gloo|gloo/transport)/[^\]]*\.cc:\d+\]"
    r"|Connection (closed|reset) by peer|Timed out waiting \d+ms for (send|recv) operation"
)
_SOURCE = re.compile(r"\[[^\]]*\.cc:\d+\] ")  # where in gloo's own source
_LONGEST = 200  # characters of it that are shown


def lost_peer(error: BaseException) -> str | None:
    """A line for the user where `error` came of a lost process; None for any other error."""
    for one in _chain(error):
        text = str(one)
        is_of_torch = type(one).__name__ in _TORCH_TYPES
        is_of_gloo = isinstance(one, RuntimeError) and _GLOO.search(text)
        if (is_of_torch or is_of_gloo) and _GONE.search(text) and not _OWN.search(text):
            return _told(_SOURCE.sub("", text))
    return None


def _told(text: str) -> str:
    reason = " ".join(text.partition("This is typically caused by")[0].split())[:_LONGEST]
    if len(reason) < len(" ".join(text.split())):
        logger.debug("of another process: %s", text)
    waits = "imed out" in reason or "timeout" in reason
    # Where the embedded host trains: only it reads that name, not another host called `lingua`.
    waits = waits and "lingua._timeout" in sys.modules
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
