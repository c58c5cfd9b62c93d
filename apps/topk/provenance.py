"""What made a result: written beside it by every program."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lingua_topk
from lingua_topk import host

ROOT = Path(__file__).resolve().parents[2]
DIRTY = "-dirty"


def provenance(**fields: Any) -> dict[str, Any]:
    """Versions, commit, host and time, with `fields` added."""
    chosen = host.bound()
    return {
        "lingua_topk": lingua_topk.__version__,
        "commit": _commit(),
        "host": chosen.describe() if chosen else None,
        "python": platform.python_version(),
        "torch": _torch_version(),
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **fields,
    }


def _torch_version() -> str | None:
    """Without importing torch, which takes seconds; None for a build that is not installed."""
    if "torch" in sys.modules:
        return sys.modules["torch"].__version__
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, marked when files differ from it; None outside git.

    In a copy that stool made, what it wrote down.
    """
    copied = ROOT / ".commit"
    if copied.is_file():
        return copied.read_text(encoding="utf-8").strip() or None
    if not (ROOT / ".git").exists():  # installed somewhere inside another repository, perhaps
        return None
    try:
        commit = _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        # A new file of the code, which is not in the commit either.
        new = _git("ls-files", "--others", "--exclude-standard", "--", "apps", "lingua_topk")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}{DIRTY}" if new and not commit.endswith(DIRTY) else commit


def _git(*words: str) -> str:
    answer = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True
    )
    return answer.stdout.strip()


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. An OSError names it, and not what it was written as."""
    try:
        _write_bytes(path, content)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
