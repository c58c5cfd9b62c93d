"""The places in the data from which another number of processes goes on.

The lines of a file are dealt anew to the processes, and what the old ones had read is no
longer a part of one process's share. So every file is read on from the first line that one
of them had still to read. Nothing is skipped; what the others were ahead is read twice, and so
is what was in their shuffling windows.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lingua._jsonl import JSONLState, parts_of
from lingua._packing import PrefetchState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Place:
    """A line of a file, in one of the passes over it."""

    current_iter: int
    position: int  # bytes
    line: int


@dataclass
class Progress:
    """How far the processes were in a file: `first` of all, and `last`."""

    first: Place
    last: Place


def reshare(old: list[PrefetchState], new: PrefetchState, rank: int, step: int) -> PrefetchState:
    """The state from which process `rank` goes on at `step`, after `old`, those of all before.

    new: its state at the beginning of a run, which says what its share is.
    """
    choice = _choice(new)
    shares = {}
    for source, share in choice["source_to_state"].items():
        progress = progress_of([_choice(state)["source_to_state"][source] for state in old])
        if rank == 0:
            _log(source, progress)
        shares[source] = _share_from(share, progress)
    choice = {
        **choice,
        "source_to_state": shares,
        "rng_state": _jumped(choice["rng_state"], step),
    }
    packed = new["it_state"]
    tokens = {**packed["it_state"], "it_state": choice}
    return PrefetchState(
        **{
            **new,
            "it_state": {**packed, "it_state": tokens},
            "rng_state": _jumped(new["rng_state"], step),
        }
    )


def progress_of(shares: list[JSONLState]) -> dict[str, Progress]:
    """By file, how far those that read of it had come."""
    found: dict[str, Progress] = {}
    for share in shares:
        current, passes = share.get("part", 0), share["current_iter"]
        for index, part in enumerate(parts_of(share)):
            path = part["file_path"]
            is_at_end = index == current and _is_at_end(path, share["position"])
            if index < current or is_at_end:  # done in this pass
                place = Place(passes + 1, 0, 0)
            elif index > current:
                place = Place(passes, 0, 0)
            else:
                place = Place(passes, share["position"], _line_of(share))
            known = found.setdefault(path, Progress(place, place))
            known.first, known.last = min(known.first, place), max(known.last, place)
    return found


def _share_from(share: JSONLState, progress: dict[str, Progress]) -> JSONLState:
    """The share, to be read on from its first part that is not done in the earliest pass."""
    parts = parts_of(share)
    beginning = Place(0, 0, 0)
    places = [
        progress[part["file_path"]].first if part["file_path"] in progress else beginning
        for part in parts
    ]
    passes = min(place.current_iter for place in places)
    index = next(i for i, place in enumerate(places) if place.current_iter == passes)
    place, part = places[index], parts[index]
    state = JSONLState(
        **{
            **share,
            "file_path": part["file_path"],
            "block_size": part["block_size"],
            "offset": part["offset"],
            "position": place.position,
            "line": place.line,
            "current_iter": passes,
        }
    )
    if "parts" in share:
        state["part"] = index
    return state


def _is_at_end(path: str, position: int) -> bool:
    return position > 0 and position == os.path.getsize(path)


def _line_of(share: JSONLState) -> int:
    """The index of the line at the share's position; Meta Lingua's states do not have it."""
    if "line" in share or share["position"] == 0:
        return share.get("line", 0)
    with open(share["file_path"], "rb") as file:
        return file.read(share["position"]).count(b"\n")


def _log(source: str, progress: dict[str, Progress]) -> None:
    for path, place in progress.items():
        first, last = place.first, place.last
        again = ""
        if last != first:
            ahead = "the end" if last.current_iter > first.current_iter else f"line {last.line}"
            again = f"; up to {ahead} some lines are read a second time"
        logger.info(
            "data of %s: %s goes on at line %d of pass %d%s",
            source, Path(path).name, first.line + 1, first.current_iter + 1, again,
        )  # fmt: skip


def _choice(state: PrefetchState) -> dict[str, Any]:
    return state["it_state"]["it_state"]["it_state"]


def _jumped(rng_state: dict[str, Any], times: int) -> dict[str, Any]:
    """The state of a generator whose draws are not those of the beginning again."""
    generator = np.random.PCG64()
    generator.state = rng_state
    return generator.jumped(times).state
