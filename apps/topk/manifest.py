"""Whether a folder is what was written: against its manifest.json, or a checkpoint's own index.

manifest.json holds {"files": {name: {"bytes": int, "sha256": hex}}}. Checkpoints of the embedded
host have one; of those that Meta Lingua wrote the index of torch.distributed.checkpoint says how
long each file must at least be.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from apps.topk.index import Reader

MANIFEST = "manifest.json"
METADATA = ".metadata"
_BLOCK = 1 << 22  # bytes


def find_damage(folder: Path) -> str | None:
    """What differs from what was written, or None; None too where nothing tells.

    Every process calls it, each reads a part of the files, and all get the same answer.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = _damage_of_part(folder, rank, size)
    if size == 1:
        return problem
    problems: list[str | None] = [None] * size
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def _damage_of_part(folder: Path, rank: int, size: int) -> str | None:
    if not (folder / MANIFEST).is_file():
        return damage_by_index(folder) if (folder / METADATA).is_file() else None
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        checks = [_damage_of_file(folder, *item) for item in sorted(files.items())[rank::size]]
        unlisted = {METADATA, "params.json"} - files.keys()
        if unlisted and (folder / METADATA).is_file():
            checks.append(f"{MANIFEST} does not list {min(unlisted)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return next(filter(None, checks), None)


def _damage_of_file(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return f"{MANIFEST} names {name}, which is no file of it"
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{name} has {path.stat().st_size} bytes and should have {entry['bytes']}"
    if sha256(path) != entry["sha256"]:
        return f"{name} is not as it was written (by its checksum)"
    return None


def is_as_written(folder: Path, name: str) -> bool:
    """Whether one small file is what the manifest says; True where there is none to ask."""
    try:
        entry = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"][name]
        return _damage_of_file(folder, name, entry) is None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return True


def damage_by_index(folder: Path) -> str | None:
    """Whether the index of a distributed checkpoint names a file that is absent or too short."""
    try:
        index = Reader(folder).read_metadata()
        ends = [(one.relative_path, one.offset + one.length) for one in index.storage_data.values()]
    except Exception as error:  # it is a pickle: broken ones raise anything
        return f"{METADATA} cannot be read ({error})"
    for name, end in sorted(ends, reverse=True):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size < end:
            return f"{name} has {(folder / name).stat().st_size} bytes and should have {end}"
    return None


def sha256(path: Path) -> str:
    """The checksum of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
