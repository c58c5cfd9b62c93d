"""What the files of a run's data are, so that a later start does not go on in another text.

    DUMP_DIR/data.json   {SOURCE/FILE: {"bytes": int, "mtime_ns": int, "pieces": str}}

"pieces" is how many pieces were taken, a colon, and their SHA-256. Files are compared by samples,
pieces that are spread evenly over a file and its ends among them: a corpus is too large to be
read whole at every start. One of up to a megabyte is; in a larger one a change between two pieces
that leaves the size as it was is not seen. A file of the same size and time is not read.

Lines added at the end of a file are allowed: what was read is as it was, and so is where the run
is in it. So are new files: a loader goes on with those that it began with. All else, a file that
is shorter, another one, or gone, would be another run from there on.
"""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from apps.topk.model import TopKTrainArgs
from apps.topk.provenance import write_json
from lingua.data import TRAIN_DATA_FILE_PATTERN
from lingua_topk.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = "data.json"
REFUSE, ACCEPT = "refuse", "accept"
PIECES, PIECE_BYTES = 256, 4096

Record = dict[str, dict[str, Any]]


def validate(choice: str) -> None:
    """ConfigError for what `changed_data` cannot be."""
    if choice not in (REFUSE, ACCEPT):
        raise ConfigError(
            f"changed_data={choice!r} is not known: choose {REFUSE} (a run does not go on with"
            f" other data) or {ACCEPT} (it does, and says so)"
        )


def check_unchanged(args: TopKTrainArgs) -> list[str]:
    """What changed since the run began and may, a line each; ConfigError for what may not."""
    then = _recorded(args)
    if then is None:
        return []
    now = _files(args)
    differing = {name: _difference(now.get(name), one) for name, one in then.items()}
    changed = [f"{name} {what}" for name, what in differing.items() if what]
    if changed and args.changed_data == REFUSE:
        more = f" ({len(changed)} such files)" if len(changed) > 1 else ""
        raise ConfigError(
            f"data.sources: {changed[0]}, unlike when the run in dump_dir={args.dump_dir}"
            f" began{more}: put it back to resume the run, start another in another dump_dir, or"
            " give changed_data=accept to go on with what is there"
        )
    grown = [
        f"{name} has {now[name].stat().st_size - one['bytes']} bytes more at its end"
        for name, one in then.items()
        if not differing[name] and now[name].stat().st_size > one["bytes"]
    ]
    new = [
        f"{name} is new, and as many processes as before do not read it"
        for name in now
        if name not in then
    ]
    return [f"data: {line}" for line in (*changed, *grown, *new)]


def record(args: TopKTrainArgs, is_new_run: bool) -> None:
    """Write down what the files are, where that is not there yet."""
    before = (None if is_new_run else _recorded(args)) or {}
    described = {}
    for name, path in _files(args).items():
        known = before.get(name)
        described[name] = known if known and _is_untouched(path, known) else _described(path)
    if described != before:
        write_json(Path(args.dump_dir, NAME), described)


def _files(args: TopKTrainArgs) -> dict[str, Path]:
    return {
        f"{source}/{path.name}": path
        for source in sorted(args.data.sources)
        for path in sorted(Path(args.data.root_dir or "", source).glob(TRAIN_DATA_FILE_PATTERN))
        if path.is_file() and not path.name.startswith(".")
    }


def _recorded(args: TopKTrainArgs) -> Record | None:
    path = Path(args.dump_dir, NAME)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, one in content.items():
            if not _is_entry(one):
                raise ValueError(f"{name} is described in another form")
        return content
    except FileNotFoundError:  # a run of an earlier version
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): changes of the data are not seen", path, error)
        return None


def _is_entry(one: Any) -> bool:
    """Whether it is as `_described` writes it: other numbers of pieces cannot be compared."""
    if not isinstance(one, dict):
        return False
    numbers = [one.get("bytes"), one.get("mtime_ns")]
    pieces = one.get("pieces")
    return (
        all(type(number) is int for number in numbers)  # True is no number here
        and numbers[0] >= 0
        and isinstance(pieces, str)
        and re.fullmatch(rf"{PIECES}:[0-9a-f]{{64}}", pieces) is not None
    )


def _difference(path: Path | None, then: dict[str, Any]) -> str | None:
    """How a file differs from what it was, or None; what was added at its end does not count."""
    if path is None:
        return "is gone"
    if _is_untouched(path, then):
        return None
    size = path.stat().st_size
    if size < then["bytes"]:
        return f"has {size} bytes, and had {then['bytes']}"
    if _digest(path, then["bytes"]) != then["pieces"]:
        return "holds another text"
    return None


def _is_untouched(path: Path, then: dict[str, Any]) -> bool:
    state = path.stat()
    return (state.st_size, state.st_mtime_ns) == (then["bytes"], then["mtime_ns"])


def _described(path: Path) -> dict[str, Any]:
    state = path.stat()
    return {
        "bytes": state.st_size, "mtime_ns": state.st_mtime_ns,
        "pieces": _digest(path, state.st_size),
    }  # fmt: skip


def _digest(path: Path, size: int) -> str:
    """Of pieces of the first `size` bytes of a file; of all of them where they are few."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= PIECES * PIECE_BYTES:
            digest.update(file.read(size))
        else:
            for i in range(PIECES):
                file.seek((size - PIECE_BYTES) * i // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return f"{PIECES}:{digest.hexdigest()}"
