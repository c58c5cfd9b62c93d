"""The places in the data from which another number of processes goes on.

The files are dealt anew, so that each process has as much left of this pass as any other, and
every file is read on from the first line that one of those before had still to read. Nothing
is skipped; what the others of them were ahead in the same file is read twice, and so is what was
in their shuffling windows.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lingua._jsonl import JSONLPart, JSONLState, parts_of, start_of
from lingua._packing import PrefetchState
from lingua._shares import find_and_sanitize_chunks, parts_of_rank, source_folder
from lingua.errors import DataError

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


def reshare(
    old: list[PrefetchState], new: PrefetchState, rank: int, world_size: int, step: int
) -> PrefetchState:
    """The state from which process `rank` goes on at `step`, after `old`, those of all before.

    new: its state at the beginning of a run. DataError where a file is gone.
    """
    choice = _choice(new)
    shares = {}
    for source in choice["source_to_state"]:
        progress = progress_of([_choice(state)["source_to_state"][source] for state in old])
        if rank == 0:
            _log(source, progress)
        folder = source_folder(choice["root_dir"], source)
        files = find_and_sanitize_chunks(folder, world_size)
        dealt = _dealt(files, progress, min(world_size, len(files)))
        shares[source] = _share_from(parts_of_rank(dealt, rank, world_size), progress)
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
            path = os.path.realpath(part["file_path"])
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


def _dealt(files: list[str], progress: dict[str, Progress], n_hands: int) -> list[str]:
    """The files in an order in which each of `n_hands` equal runs has as many that are done."""
    by_what_is_left = sorted(files, key=lambda path: _first(path, progress))
    return [path for hand in range(n_hands) for path in by_what_is_left[hand::n_hands]]


def _first(path: str, progress: dict[str, Progress]) -> Place:
    known = progress.get(os.path.realpath(path))
    return known.first if known else Place(0, 0, 0)


def _share_from(parts: list[JSONLPart], progress: dict[str, Progress]) -> JSONLState:
    """The share of these parts, read on where each of them is in the earliest pass of all."""
    places = [_first(part["file_path"], progress) for part in parts]
    passes = min(place.current_iter for place in places)
    begun = [
        [place.position, place.line] if place.current_iter == passes else [_size(path), 0]
        for place, path in zip(places, (part["file_path"] for part in parts), strict=True)
    ]
    index = next(i for i, place in enumerate(places) if place.current_iter == passes)
    part = parts[index]
    state = JSONLState(
        **{
            **start_of(parts),
            "file_path": part["file_path"],
            "block_size": part["block_size"],
            "offset": part["offset"],
            "position": begun[index][0],
            "line": begun[index][1],
            "current_iter": passes,
        }
    )
    if len(parts) > 1:
        state["part"], state["begun"] = index, begun
    return state


def _is_at_end(path: str, position: int) -> bool:
    return position > 0 and position == _size(path)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): put it back, or start a new run"
        ) from None


def _line_of(share: JSONLState) -> int:
    """The index of the line at the share's position; Meta Lingua's states do not have it."""
    if "line" in share or share["position"] == 0:
        return share.get("line", 0)
    left, lines = share["position"], 0
    with open(share["file_path"], "rb") as file:
        while left and (block := file.read(min(left, 1 << 22))):
            left, lines = left - len(block), lines + block.count(b"\n")
    return lines


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
