"""The working folder beside OUT: what a run has done so far, so that the next can go on.

    .OUT.prepare-work/reading.json   how far the sources are read
    .OUT.prepare-work/documents      the documents read (records.py)
    .OUT.prepare-work/dealing.json   how far they are dealt out
    .OUT.prepare-work/held_out       those of them that are held out
    .OUT.prepare-work/new/           what becomes OUT

The JSON files are replaced whole, after what they speak of is on the disk; what lies beyond
the sizes in them is cut off by the run that goes on. The folder is locked while it is used.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from apps.topk import cli
from apps.topk.provenance import write_json
from lingua_topk._host.lingua._lock import NAME as LOCK_NAME
from lingua_topk.errors import DataError

SAVING_SHARE = 0.05  # of the time that goes into saving, at most
LONGEST_UNSAVED = 60.0  # seconds


class Paused(DataError):
    """The run stops, but what it did is kept: the same command goes on from there."""


class Work:
    """A working folder that this process holds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.new = folder / "new"
        self.documents = folder / "documents"
        self.held_out = folder / "held_out"

    def load(self, part: str) -> dict[str, Any] | None:
        """What was saved last for `part`, "reading" or "dealing"; None for nothing."""
        try:
            state = json.loads((self.folder / f"{part}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return state if isinstance(state, dict) else None

    def save(self, part: str, state: dict[str, Any]) -> None:
        """Keep `state`, which is JSON, in place of the one before."""
        write_json(self.folder / f"{part}.json", state)

    def clear(self) -> None:
        """Remove what is in the folder."""
        for path in self.folder.iterdir():
            if path.name != LOCK_NAME:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def clear_dealing(self) -> None:
        """Remove what was made of the documents, not the documents."""
        shutil.rmtree(self.new, ignore_errors=True)
        for path in (self.folder / "dealing.json", self.held_out):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove what is in the folder, which goes itself when nobody holds it any more."""
        # The state first: without it, what is left after a kill is no work to go on with.
        for part in ("dealing", "reading"):
            (self.folder / f"{part}.json").unlink(missing_ok=True)
        with suppress(OSError):
            self.clear()


class Pace:
    """When to save: often, but so that saving takes SAVING_SHARE of the time at most."""

    def __init__(self) -> None:
        self._saved = time.monotonic()
        self._cost = 0.0

    def is_due(self) -> bool:
        since = time.monotonic() - self._saved
        return since >= self._cost * (1 - SAVING_SHARE) / SAVING_SHARE

    def is_overdue(self) -> bool:
        return time.monotonic() - self._saved >= LONGEST_UNSAVED

    @contextmanager
    def saving(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._cost = self._saved - start


def folder_of(out: Path) -> Path:
    """The working folder that belongs to `out`."""
    return out.with_name(f".{out.name}.prepare-work")


@contextmanager
def working_folder(out: Path) -> Iterator[Work]:
    """The working folder of `out`, made where there is none, locked until the block ends.

    ConfigError while another process works there.
    """
    folder = folder_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with cli.alone(folder, "out", given=out):
            yield Work(folder)
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()
