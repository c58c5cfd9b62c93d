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


class Stopped(SystemExit):
    """SIGTERM came, and reached what was running: nothing else is to be started."""


def run(commands: Mapping[str, Sequence[str]]) -> None:
    """Run `python -m ...` for the words of every command, until all are done.

    The cores are divided among them, unless OMP_NUM_THREADS says how many each has. Ctrl-C and
    SIGTERM reach them all, and are waited for; after SIGTERM `Stopped` is raised, however they
    ended. Where one fails the others are ended by SIGTERM, and SystemExit has its status: it has
    said why.
    """
    failed = next(iter(statuses(commands, together=True).values()), 0)
    if failed:
        raise SystemExit(failed)


def statuses(commands: Mapping[str, Sequence[str]], together: bool = False) -> dict[str, int]:
    """The same, and by name the statuses of those that failed, the first one first.

    together: whether one that fails ends the others.
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
    with _forwarding(signal.SIGTERM, list(children.values())) as forwarded:
        try:
            failed = _wait(children, together)
        finally:  # also of a Ctrl-C, which they have had as well
            for child in children.values():
                child.wait()
            for reader in readers:
                reader.join()
    if forwarded:
        raise Stopped(128 + signal.SIGTERM)
    return {name: status if status > 0 else 1 for name, status in failed.items()}


def _copy(pipe: IO[str], out: TextIO, mark: str) -> None:
    with pipe:
        for line in pipe:
            out.write(f"{mark}{line.rstrip()}\n")
            out.flush()


@contextmanager
def _forwarding(number: int, children: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Within it a signal goes to the children, and is noted in the list."""
    noted: list[int] = []

    def forward(number, frame) -> None:
        noted.append(number)
        for child in children:
            child.send_signal(number)

    before = signal.signal(number, forward)
    try:
        yield noted
    finally:
        signal.signal(number, before)


def _wait(children: Mapping[str, subprocess.Popen], together: bool) -> dict[str, int]:
    """Wait for all, or for the first that fails, which ends the others; who failed, and how."""
    failed: dict[str, int] = {}
    while True:
        found = {name: child.poll() for name, child in children.items()}
        failed |= {name: status for name, status in found.items() if status}
        if failed and together:
            for name, status in found.items():
                if status is None:
                    children[name].terminate()
            return failed
        if None not in found.values():
            return failed
        time.sleep(POLL_SECONDS)
