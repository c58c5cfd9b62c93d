"""Programs of this project at the same time, the lines of each marked with its name."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TextIO

THREADS = "OMP_NUM_THREADS"
# Bars move the cursor, which marked lines of several programs cannot.
WITHOUT_BARS = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
POLL_SECONDS = 0.2


def run(commands: Mapping[str, Sequence[str]]) -> None:
    """Run `python -m ...` for the words of every command, until all are done.

    The cores are divided among them, unless OMP_NUM_THREADS says how many each has. Ctrl-C and
    SIGTERM reach them all, and are waited for. Where one fails the others are ended by
    SIGTERM, and SystemExit has its status: it has said why.
    """
    share = max((os.cpu_count() or 1) // len(commands), 1)
    environment = {**WITHOUT_BARS, THREADS: str(share), **os.environ, "PYTHONUNBUFFERED": "1"}
    width = max(map(len, commands))
    children = {
        name: subprocess.Popen(
            [sys.executable, "-m", *words], env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name, words in commands.items()
    }  # fmt: skip
    readers = [
        threading.Thread(target=_copy, args=(pipe, out, f"{name:<{width}} | "))
        for name, child in children.items()
        for pipe, out in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    with _forwarding(signal.SIGTERM, list(children.values())):
        try:
            status = _wait(list(children.values()))
        finally:  # also of a Ctrl-C, which they have had as well
            for child in children.values():
                child.wait()
            for reader in readers:
                reader.join()
    if status != 0:
        raise SystemExit(status if status > 0 else 1)


def _copy(pipe: IO[str], out: TextIO, mark: str) -> None:
    with pipe:
        for line in pipe:
            out.write(f"{mark}{line.rstrip()}\n")
            out.flush()


@contextmanager
def _forwarding(number: int, children: list[subprocess.Popen]) -> Iterator[None]:
    def forward(number, frame) -> None:
        for child in children:
            child.send_signal(number)

    before = signal.signal(number, forward)
    try:
        yield
    finally:
        signal.signal(number, before)


def _wait(children: list[subprocess.Popen]) -> int:
    """Wait for all; the status of the first that failed, which ends the others, or 0."""
    while True:
        statuses = [child.poll() for child in children]
        failed = next((status for status in statuses if status), 0)
        if failed:
            for child, status in zip(children, statuses, strict=True):
                if status is None:
                    child.terminate()
            return failed
        if None not in statuses:
            return 0
        time.sleep(POLL_SECONDS)
