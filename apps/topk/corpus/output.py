"""The folder that prepare writes: whole or not at all, and recognised when it is there.

It is built in a working folder beside its place (work.py) and renamed at the end.

    OUT/NAME/NAME.chunk.00.jsonl ...   training documents, one JSON object a line
    OUT/NAME/NAME.val.jsonl            held-out documents
    OUT/tokenizer.model, .vocab        where a tokenizer was asked for
    OUT/manifest.json                  written last: counts, arguments, sizes, checksums
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apps.topk.corpus import progress
from lingua_topk.errors import ConfigError, DataError

MANIFEST = "manifest.json"
# Raised when the same arguments begin to give other files.
FORMAT = 1

_Warn = Callable[[str], None]


def chunk_name(name: str, chunk: int, chunks: int) -> str:
    """The file name of a training chunk, which loaders find as *.chunk.*.jsonl."""
    return f"{name}.chunk.{chunk:0{max(2, len(str(chunks - 1)))}d}.jsonl"


def validation_name(name: str) -> str:
    """The file name of the held-out documents, which validation finds as *.val.jsonl."""
    return f"{name}.val.jsonl"


def write_bytes(path: Path, content: bytes) -> None:
    """A file synced to disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder`, by its path inside."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path: path.stat().st_size for path in paths}
    with progress.bar("checksums", sum(sizes.values()), "B") as shown:
        return {
            str(path.relative_to(folder)): {"bytes": sizes[path], "sha256": _sha256(path, shown)}
            for path in paths
        }


def find_finished(out: Path, inputs: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The manifest in `out` when what it describes is there and was made from `inputs`.

    None when there is nothing in the way of writing `out`, which with `overwrite` includes
    what an earlier run wrote. Anything else is an error, and nothing is touched:
    ConfigError for other inputs and for a folder that prepare did not make, DataError for
    damaged output.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = _read_manifest(out)
    if overwrite:
        _refuse_foreign_files(out, manifest)
        return None
    found = differences(inputs, manifest["inputs"])
    if manifest.get("format") != FORMAT:
        found.append(f"format={FORMAT} (there: {manifest.get('format')})")
    if found:
        raise ConfigError(
            f"out={str(out)!r} was made with other inputs: {', '.join(found)};"
            " choose another --out, or --overwrite true to replace it"
        )
    for name, described in manifest["files"].items():
        path = out / name
        if not path.is_file() or path.stat().st_size != described["bytes"]:
            raise DataError(
                f"{path} is missing or of another size than {MANIFEST} says: --overwrite true"
                " makes all files anew"
            )
    return manifest


def put_back(out: Path, warn: _Warn) -> None:
    """Put back the `out` that a run killed by `publish` was replacing, or remove it."""
    replaced = replaced_folder(out)
    if not replaced.is_dir():
        return
    if out.exists():
        warn(f"removing {replaced}, left by a run that was interrupted")
        shutil.rmtree(replaced)
    else:
        warn(f"putting back {out}, which an interrupted run was about to replace")
        os.rename(replaced, out)


def publish(new: Path, out: Path, replace: bool) -> None:
    """Make the folder `new` the folder `out`, at once.

    What is in `out` gives way only with `replace`; when that fails, `out` is as it was.
    """
    replaced = replaced_folder(out)
    for folder in (new, *(path for path in new.rglob("*") if path.is_dir())):
        sync_path(folder)
    try:
        if replace and out.exists():
            os.rename(out, replaced)
        os.rename(new, out)  # fails where `out` holds files
    except BaseException:
        if replaced.exists() and not out.exists():
            os.rename(replaced, out)
        raise
    sync_path(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def replaced_folder(out: Path) -> Path:
    """Where the old `out` is while a new one takes its place."""
    return out.with_name(f".{out.name}.prepare-replaced")


def _read_manifest(out: Path) -> dict[str, Any]:
    path = out / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(manifest[part], dict) for part in ("inputs", "counts", "files")):
            return manifest
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise ConfigError(
        f"out={str(out)!r} is there already and holds no readable {MANIFEST}, so prepare did not"
        " make it and will not replace it: choose another --out"
    )


def _refuse_foreign_files(out: Path, manifest: dict[str, Any]) -> None:
    known = {MANIFEST, *manifest["files"]}
    present = (str(path.relative_to(out)) for path in sorted(out.rglob("*")) if not path.is_dir())
    foreign = [name for name in present if name not in known]
    if foreign:
        raise ConfigError(
            f"out={str(out)!r} holds files that prepare did not write ({', '.join(foreign[:3])}),"
            " which --overwrite true would delete: move them, or choose another --out"
        )


def differences(wanted: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """What is asked for and differs from what is there, each with both values."""
    found = []
    for key in sorted(wanted.keys() | there.keys()):
        new, old = wanted.get(key), there.get(key)
        if new == old:
            continue
        if key == "sources":
            found.append(_source_difference(new or [], old or []))
        else:
            found.append(f"{key}={new!r} (there: {old!r})")
    return found


def _source_difference(new: list[dict[str, Any]], old: list[dict[str, Any]]) -> str:
    for one, other in zip(new, old, strict=False):
        if one == other:
            continue
        here, there = _named(one), _named(other)
        if here == there:
            return f"the files of {here}, which changed since"
        return f"source {here} (there: {there})"
    return f"{len(new)} sources (there: {len(old)})"


def _named(source: dict[str, Any]) -> str:
    """What a source's fingerprint says of it, without the state of its files."""
    if "hf" in source:
        revision = f"@{source['revision']}" if source["revision"] else ""
        return f"hf:{source['hf']}{revision}:{source['config'] or ''}:{source['split']}"
    if "python" in source:
        return f"python-docs of Python {source['python']}"
    return source.get("path", str(source))


def _sha256(path: Path, shown: tqdm) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            shown.update(len(block))
    return digest.hexdigest()


def sync_path(path: Path) -> None:
    """Have a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
