"""metrics.jsonl and the like: one JSON object a line, each step once."""

import itertools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

RECORDS = ("metrics.jsonl", "metrics.validation.jsonl", "metrics.eval.jsonl")


def trim_records(dump_dir: str | Path, step: int, names: Sequence[str] = RECORDS) -> None:
    """Drop from a run's records what was written after `step`: it is done again.

    Truncated in place, since a program may have the file open to append to.
    """
    if not _is_master():
        return
    for name in names:
        path = Path(dump_dir, name)
        if path.is_file():
            end = _end_of(path, step)
            if end < path.stat().st_size:
                logger.info(
                    "%s: lines after step %d dropped; those steps are done again", name, step
                )
                os.truncate(path, end)


def set_aside_records(dump_dir: str | Path) -> None:
    """Rename what another run wrote here, or this one before its first checkpoint."""
    if not _is_master():
        return
    for name in RECORDS:
        path = Path(dump_dir, name)
        if path.is_file() and path.stat().st_size:
            n = next(n for n in itertools.count(1) if not Path(f"{path}.{n}").exists())
            logger.warning("%s is set aside as %s.%d: this run begins at step 0", name, name, n)
            path.rename(f"{path}.{n}")


def drop_step(path: Path, step: int) -> None:
    """Drop the lines of one step, and half-written ones; all others stay."""
    with open(path, "rb") as file:
        kept = [line for line in file if line.endswith(b"\n") and _place(line) != (step, 0)]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(b"".join(kept))
    os.replace(partial, path)


def _is_master() -> bool:
    from lingua.distributed import get_is_master  # with torch, and to read records needs none

    return get_is_master()


def _end_of(path: Path, step: int) -> int:
    """The byte after the last line that belongs to `step` or before, half-written ones not."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or _is_after(line, step):
                break
            end += len(line)
    return end


def _is_after(line: bytes, step: int) -> bool:
    place = _place(line)
    return place is not None and place > (step, 0)


def _place(line: bytes) -> tuple[int, int] | None:
    try:
        content = json.loads(line)
        return int(content["global_step"]), int(content.get("acc_step", 0))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None  # not ours; it stays
