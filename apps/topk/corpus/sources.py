"""What `--source` may name, and how a source is read.

A source is read as a stream, one document after another, from its beginning or from a
cursor that it gave before.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from apps.topk.corpus import hub
from apps.topk.corpus.local_files import KINDS, LocalFiles
from apps.topk.corpus.python_docs import PythonDocs
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.text_files import COMPRESSIONS
from lingua_topk.errors import ConfigError

PYTHON_DOCS = "python-docs"


class Source(Protocol):
    """Text from one place."""

    label: str  # what the user called it
    size: int  # how much there is to read, in any unit, 0 where unknown; for the progress bar
    done: int  # how much of it has been read
    unit: str  # of both, as the progress bar shows it

    def open(self) -> None:
        """Find what is to be read, so that mistakes show before other sources are read."""

    def documents(self, tally: Tally, start: Any = None) -> Iterator[str]:
        """Every document, in a fixed order, or those after the cursor `start`; problems are
        counted in `tally`."""

    def cursor(self) -> Any:
        """JSON that says after which document the reading is."""

    def origin(self) -> dict[str, Any] | None:
        """What was read, where the fingerprint does not say it all; JSON."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON that is equal for two runs if, and as far as one can tell cheaply only if,
        they read the same text."""


def open_sources(source: str, text_key: str, out: Path) -> list[Source]:
    """The sources that a comma-separated `source` names.

    ConfigError for a name that is neither python-docs nor a data set's nor a path, for one
    given twice, and where sources and `out` overlap; DataError for a folder without text.
    """
    keys = [key.strip() for key in text_key.split(",") if key.strip()]
    if not keys:
        raise ConfigError(f"text_key={text_key!r} names no key: give one, or several with commas")
    names = [source] if os.path.exists(source) else [name.strip() for name in source.split(",")]
    if len(set(names)) < len(names):
        raise ConfigError(f"source={source!r} names the same source twice: name each once")
    return [_open(name, keys, out) for name in names]


def _open(name: str, text_keys: list[str], out: Path) -> Source:
    if name == PYTHON_DOCS:
        return PythonDocs()
    if name.startswith(hub.PREFIX):
        dataset = hub.HubDataset(name, text_keys)
        if dataset.name.folder:
            _refuse_overlap(name, dataset.name.folder, out)
        return dataset
    path = Path(name).expanduser()
    if not name or not os.path.exists(path):
        raise ConfigError(
            f"source={name!r} is neither {PYTHON_DOCS} nor a file or folder that exists, nor of the"
            f" form {hub.SYNTAX}: give the path of {'/'.join(KINDS)} files (also with"
            f" {'/'.join(COMPRESSIONS)}) or of a folder of them"
        )
    _refuse_overlap(name, path, out)
    return LocalFiles(path, name, text_keys)


def _refuse_overlap(name: str, path: Path, out: Path) -> None:
    here, there = path.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConfigError(
            f"source={name!r} and out={str(out)!r} lie in one another: choose an --out elsewhere,"
            " or prepare would read what it wrote"
        )
