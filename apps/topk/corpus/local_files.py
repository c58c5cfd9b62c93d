"""Documents from files: .txt and .jsonl, plain or compressed, and .parquet."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.topk.corpus import text_files
from apps.topk.corpus.parquet_files import ParquetFile
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.text_files import COMPRESSIONS, EMPTY, MALFORMED, NO_TEXT, TextFile, kind
from lingua_topk.errors import DataError

KINDS = (*text_files.KINDS, ".parquet")
TEXT_KEYS = ["text", "content"]  # where the hosts' data loaders look for a document
REASONS = (MALFORMED, NO_TEXT, EMPTY)  # why a line or row gives no document
NOT_TEXT_FILES = "files of another kind left aside"
EMPTY_FILES = "empty files"


class LocalFiles:
    """A file, or every .txt, .jsonl and .parquet file below a folder (hidden ones aside)."""

    unit = "B"

    def __init__(self, path: Path, label: str, text_keys: list[str]):
        self.label = label
        self.text_keys = text_keys
        self.root = path
        self.files, self.other_files = _find(path, label)
        self._states = [file.stat() for file in self.files]
        self.size = sum(state.st_size for state in self._states)  # bytes as stored
        self.done = 0
        self._cursor: dict[str, Any] = {}
        self._reader: TextFile | ParquetFile | None = None

    def open(self) -> None:
        """Nothing: the files are known."""

    def fingerprint(self) -> dict[str, Any]:
        return {"path": str(self.root.resolve()), "files": describe(self.root, self.files)}

    def origin(self) -> dict[str, Any] | None:
        return None  # the fingerprint says all

    def cursor(self) -> dict[str, Any]:
        return {**self._cursor, "position": self._reader.position}

    def documents(self, tally: Tally, start: dict[str, Any] | None = None) -> Iterator[str]:
        """Every document, or those after the cursor `start`.

        DataError for a damaged file, for one that changes while it is read and for one that
        holds no document.
        """
        if start is None:
            for file in self.other_files:
                tally.add(NOT_TEXT_FILES, str(file))
            start = {"file": 0, "found": 0, "found_here": 0, "position": None}
        self._cursor, position = {**start}, start["position"]
        for number in range(start["file"], len(self.files)):
            self._cursor["file"] = number
            yield from self._documents(number, tally, position)
            self._cursor["found_here"], position = 0, None
        if not self._cursor["found"]:
            raise DataError(f"source={self.label!r} holds no document: all its files are empty")

    def _documents(self, number: int, tally: Tally, position: Any) -> Iterator[str]:
        file, cursor = self.files[number], self._cursor
        before = sum(state.st_size for state in self._states[:number])
        reader_type = ParquetFile if kind(file) == ".parquet" else TextFile
        reader = self._reader = reader_type(file, self.text_keys, tally, position)
        for text in reader.documents():
            cursor["found"] += 1
            cursor["found_here"] += 1
            self.done = before + reader.done
            yield text
        self._check_unchanged(number)
        self.done = before + self._states[number].st_size
        if not reader.read:
            tally.add(EMPTY_FILES, str(file))
        elif not cursor["found_here"]:
            raise DataError(self._without_documents(reader, tally))

    def _check_unchanged(self, number: int) -> None:
        # A file that shrinks ends early, and nothing else tells.
        file, state = self.files[number], self._states[number]
        try:
            now = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
        if (now.st_size, now.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
            raise DataError(f"{file} changed while it was read: run again when it is complete")

    def _without_documents(self, reader: TextFile | ParquetFile, tally: Tally) -> str:
        file = reader.file
        places = [place for kind in REASONS for place in tally.examples.get(kind, [])]
        first = next((place for place in places if place.startswith(f"{file}:")), "all are blank")
        return (
            f"{file}: none of its {reader.read:,} {reader.unit} gives a document ({first}): correct"
            f" or remove the file, or set --text_key (it is {','.join(self.text_keys)})"
        )


def describe(root: Path, files: list[Path]) -> list[dict[str, Any]]:
    """Path below `root`, size and time of every file, as a fingerprint holds them."""
    states = [(file, file.stat()) for file in files]
    return [
        {
            "path": str(file.relative_to(root)) if file != root else file.name,
            "bytes": state.st_size,
            "mtime_ns": state.st_mtime_ns,
        }
        for file, state in states
    ]


def files_below(path: Path) -> list[Path]:
    """The files of a folder, to the bottom and sorted, hidden ones aside."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files


def _find(path: Path, label: str) -> tuple[list[Path], list[Path]]:
    """The files to read, sorted, and those of another kind; DataError where there is none."""
    files = [path] if path.is_file() else files_below(path)
    ours = [file for file in files if kind(file) in KINDS and file.is_file()]
    if not ours:
        raise DataError(
            f"source={label!r} holds no {', '.join(KINDS[:-1])} or {KINDS[-1]} file (.txt and"
            f" .jsonl also with {', '.join(COMPRESSIONS)}): name a file or folder that does"
        )
    known = set(ours)
    return ours, [file for file in files if file not in known]
