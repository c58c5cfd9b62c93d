"""The folder that prepare writes: whole or not at all, and recognised when it is there.

It is built beside its place under a hidden name, which is locked while it is written, and
renamed at the end. What an interrupted run left under that name is removed by the next.

    OUT/NAME/NAME.chunk.00.jsonl ...   training documents, one JSON object a line
    OUT/NAME/NAME.val.jsonl            held-out documents
    OUT/tokenizer.model, .vocab        where a tokenizer was asked for
    OUT/manifest.json                  written last: counts, arguments, sizes, checksums
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """One {"text": ...} a line, synced to disk."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
        _sync(file)


def write_bytes(path: Path, content: bytes) -> None:
    """A file synced to disk."""
    with open(path, "wb") as file:
        file.write(content)
        _sync(file)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder`, by its path inside."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
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
    differences = _differences(inputs, manifest["inputs"])
    if manifest.get("format") != FORMAT:
        differences.append(f"format={FORMAT} (there: {manifest.get('format')})")
    if differences:
        raise ConfigError(
            f"out={str(out)!r} was made with other inputs: {', '.join(differences)};"
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


def clear_leftovers(out: Path, warn: _Warn) -> None:
    """Remove what an interrupted run left beside `out`; put back what it was replacing.

    ConfigError while another process is writing there.
    """
    partial, replaced = _partial(out), _replaced(out)
    if partial.is_dir():
        with _locked(partial, out):
            warn(f"removing {partial}, left by a run that was interrupted")
            shutil.rmtree(partial)
    if replaced.is_dir():
        if out.exists():
            warn(f"removing {replaced}, left by a run that was interrupted")
            shutil.rmtree(replaced)
        else:
            warn(f"putting back {out}, which an interrupted run was about to replace")
            os.rename(replaced, out)


@contextmanager
def whole_folder(out: Path, replace: bool) -> Iterator[Path]:
    """A new folder to write into, which becomes `out` when the block ends well.

    What is in `out` gives way only with `replace`. When the block raises, the new folder is
    removed and `out` is as it was. ConfigError while another process is writing there.
    """
    partial, replaced = _partial(out), _replaced(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        raise ConfigError(_busy(out)) from None
    with _locked(partial, out):
        try:
            yield partial
            for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
                _sync_folder(folder)
            if replace and out.exists():
                os.rename(out, replaced)
            os.rename(partial, out)  # fails where `out` holds files
            _sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if replaced.exists() and not out.exists():
                os.rename(replaced, out)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.prepare-partial")


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.prepare-replaced")


def _busy(out: Path) -> str:
    return f"out={str(out)!r} is being written by another process: wait for it, or choose another"


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold a lock on `folder` that ends with the process; ConfigError where another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(_busy(out)) from None
    except OSError:
        pass  # a file system without locks: two runs at once are then the user's to avoid
    try:
        yield
    finally:
        os.close(descriptor)


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


def _differences(wanted: dict[str, Any], there: dict[str, Any]) -> list[str]:
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
        if one.get("path") != other.get("path"):
            return f"source {one.get('path', one)} (there: {other.get('path', other)})"
        if one == other:
            continue
        if "python" in one:
            return f"python-docs of Python {one['python']} (there: {other.get('python')})"
        return f"the files of {one['path']}, which changed since"
    return f"{len(new)} sources (there: {len(old)})"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
