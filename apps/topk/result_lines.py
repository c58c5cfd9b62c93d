"""Results as JSON lines in a new file, with how they were made beside it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apps.topk.provenance import write_json, write_text
from lingua_topk.errors import ConfigError

PROVENANCE_SUFFIX = ".provenance.json"


def new_file(name: str) -> Path | None:
    """The file to write, None for "".

    name: the value of --json. ConfigError where the file is there already, or could not be
    written in the end.
    """
    if not name:
        return None
    path = Path(name).expanduser()
    for one in (path, _beside(path)):
        if os.path.lexists(one):
            raise ConfigError(f"json={name!r}: {one} is there already: choose another --json")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"json={name!r}: {path.parent} is no folder that can be written to")
    return path


def write(path: Path, lines: Iterable[Mapping[str, Any]], origin: Mapping[str, Any]) -> int:
    """Write a line each, whole or not at all, and beside them how they were made; how many.

    ConfigError where that fails; nothing is left then.
    """
    content = [json.dumps(line, allow_nan=False) + "\n" for line in lines]
    try:
        write_json(_beside(path), origin)
        write_text(path, "".join(content))
    except OSError as error:
        _beside(path).unlink(missing_ok=True)
        raise ConfigError(f"json={str(path)!r} cannot be written: {error.strerror}") from None
    return len(content)


def _beside(path: Path) -> Path:
    return Path(f"{path}{PROVENANCE_SUFFIX}")
