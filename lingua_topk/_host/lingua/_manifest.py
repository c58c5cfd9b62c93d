"""Whether a checkpoint is what was saved: its files, their sizes and checksums.

manifest.json, written last, is {"files": {name: {"bytes": int, "sha256": hex}}}. A checkpoint
that Meta Lingua wrote has none; there the index of torch.distributed.checkpoint says how
long each file must at least be.

apps.topk checks checkpoints by this module on both hosts, under its name within lingua_topk:
it and what it imports need nothing else of the host.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

MANIFEST_NAME = "manifest.json"
_BLOCK = 1 << 22  # bytes


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files in `folder`, by name."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in names
    }


def describe_checkpoint(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of all files, on every rank, each file read by one rank. All ranks call it."""
    rank, size = _rank_and_size()
    names = together(lambda: [path.name for path in folder.iterdir() if path.is_file()])[0]
    described: dict[str, dict[str, Any]] = {}
    for part in together(lambda: describe_files(folder, sorted(names)[rank::size])):
        described.update(part)
    return dict(sorted(described.items()))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. All ranks call it and get the same answer."""
    rank, size = _rank_and_size()
    problem, files = from_first(_expected_files(folder) if rank == 0 else None)
    if problem is None:
        own = dict(sorted(files.items())[rank::size])
        problem = next(filter(None, gathered(_first_difference(folder, own))), None)
    return problem


def is_as_written(folder: Path, name: str) -> bool:
    """Whether one small file is what the manifest says; True where there is none to ask."""
    files = _expected_files(folder)[1] if (folder / MANIFEST_NAME).is_file() else {}
    return name not in files or _first_difference(folder, {name: files[name]}) is None


def _expected_files(folder: Path) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """(what is wrong already, or None; what each file should be)."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return damage_without_manifest(folder), {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            if (
                Path(name).name != name
                or not isinstance(entry["bytes"], int)
                or not entry["sha256"]
            ):
                return f"{MANIFEST_NAME} lists what is no file of it", {}
        for name in (".metadata", "params.json"):
            if name not in files:
                return f"{MANIFEST_NAME} does not list {name}", {}
        return None, files
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_NAME} cannot be read ({error})", {}


def _first_difference(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, entry in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes and should have {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} is not as it was written (by its checksum)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def damage_without_manifest(folder: Path) -> str | None:
    """What a checkpoint lacks that Meta Lingua writes in place, file by file, or None."""
    for name in (".metadata", "params.json"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    states = sorted(folder.glob("train_state_*.json"))
    for path in (folder / "params.json", *states):
        if not isinstance(_read_json(path), dict):
            return f"{path.name} cannot be read"
    expected = n_writers(folder) // _tp_size(folder)
    if states and len(states) < expected:
        return f"it has {len(states)} of {expected} train_state files"
    return _index_damage(folder)


def n_writers(folder: Path) -> int:
    """How many processes wrote a checkpoint; each has a file of its own in it."""
    names = (re.fullmatch(r"__(\d+)_\d+\.distcp", path.name) for path in folder.iterdir())
    return max((int(name[1]) + 1 for name in names if name), default=0)


def _tp_size(folder: Path) -> int:
    """Of the run that saved it: a train state is written by the first of so many processes."""
    try:
        return max(int(_read_json(folder / "params.json")["distributed"]["tp_size"]), 1)
    except (LookupError, TypeError, ValueError):
        return 1


def _read_json(path: Path) -> Any:
    """The content, None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _index_damage(folder: Path) -> str | None:
    """Whether a file that the index names is absent or too short."""
    from ._index import Reader

    try:
        index = Reader(folder).read_metadata()
        ends: dict[str, int] = {}
        for entry in index.storage_data.values():
            end = entry.offset + entry.length
            ends[entry.relative_path] = max(end, ends.get(entry.relative_path, 0))
    except Exception as error:  # it is a pickle: broken ones raise anything
        return f".metadata cannot be read ({error})"
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < end:
            return f"{name} has {path.stat().st_size} bytes and should have {end}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if _rank_and_size()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in order, on every rank."""
    size = _rank_and_size()[1]
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> list[T]:
    """What every rank's `work` gives, in order. What one of them cannot read or write is an
    OSError in all of them: alone it would leave the others waiting."""
    result = problem = None
    try:
        result = work()
    except OSError as error:
        problem = error
    parts = gathered((result, problem))
    problems = [error for _, error in parts if error is not None]
    if problems:
        raise problems[0]
    return [part for part, _ in parts]
