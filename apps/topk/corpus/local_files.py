"""Documents from .txt and .jsonl files, plain or compressed with gzip or xz.

Files are read as UTF-8, line by line. Bytes that are no UTF-8, and lone surrogates
that a JSON escape can hold, become U+FFFD; the lines are counted and named.
"""

import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from apps.topk.corpus.passages import WHOLE_CHARS, passages
from apps.topk.corpus.tally import Tally
from lingua_topk.errors import DataError

KINDS = (".txt", ".jsonl")
COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open}

MALFORMED = "malformed lines skipped"
NO_TEXT = "lines without the text key skipped"
EMPTY = "empty documents skipped"
REPLACED = "lines with characters that are not Unicode, mended with U+FFFD"
REASONS = (MALFORMED, NO_TEXT, EMPTY)  # why a line gives no document
NOT_TEXT_FILES = "files of another kind left aside"
EMPTY_FILES = "empty files"

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class LocalFiles:
    """A file, or every .txt and .jsonl file below a folder (hidden ones aside)."""

    def __init__(self, path: Path, label: str, text_keys: list[str]):
        self.label = label
        self.text_keys = text_keys
        self.root = path
        self.files, self.other_files = _find(path, label)
        self.size = sum(file.stat().st_size for file in self.files)  # bytes as stored
        self.done = 0
        self._line = 0  # number of the line read last in the file that is being read

    def fingerprint(self) -> dict[str, Any]:
        states = [(file, file.stat()) for file in self.files]
        return {
            "path": str(self.root.resolve()),
            "files": [
                {
                    "path": str(file.relative_to(self.root)) if file != self.root else file.name,
                    "bytes": state.st_size,
                    "mtime_ns": state.st_mtime_ns,
                }
                for file, state in states
            ],
        }

    def documents(self, tally: Tally) -> Iterator[str]:
        """Every document; DataError for a damaged file and for one that holds no document."""
        for file in self.other_files:
            tally.add(NOT_TEXT_FILES, str(file))
        found = 0
        for file in self.files:
            lines = self._lines(file, tally)
            is_jsonl = _kind(file) == ".jsonl"
            found_before = found
            for text in self._texts(lines, file, tally) if is_jsonl else _whole_or_cut(lines):
                found += 1
                yield text
            if not self._line:
                tally.add(EMPTY_FILES, str(file))
            elif found == found_before:
                raise DataError(self._without_documents(file, tally))
        if not found:
            raise DataError(f"source={self.label!r} holds no document: all its files are empty")

    def _without_documents(self, file: Path, tally: Tally) -> str:
        places = [place for kind in REASONS for place in tally.examples.get(kind, [])]
        first = next((place for place in places if place.startswith(f"{file}:")), "all are blank")
        return (
            f"{file}: none of its {self._line:,} lines gives a document ({first}): correct or"
            f" remove the file, or set --text_key (it is {','.join(self.text_keys)})"
        )

    def _lines(self, file: Path, tally: Tally) -> Iterator[str]:
        """The lines of `file` with their ends, \\r\\n made \\n; DataError where it is damaged."""
        done_before = self.done
        self._line = 0
        try:
            with open(file, "rb") as raw:
                opener = COMPRESSIONS.get(file.suffix.lower())
                stream = io.BufferedReader(opener(raw)) if opener else raw
                for self._line, line in enumerate(stream, 1):
                    if self._line == 1:
                        if line.startswith(_UTF16_MARKS):
                            raise DataError(f"{file} is UTF-16: convert it to UTF-8")
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    yield _decode(line, f"{file}:{self._line}", tally)
                    self.done = done_before + raw.tell()
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{file} is damaged or truncated after line {self._line:,} ({error}): get a"
                " whole copy"
            ) from None
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
        self.done = done_before + file.stat().st_size

    def _texts(self, lines: Iterator[str], file: Path, tally: Tally) -> Iterator[str]:
        """The text of every line of a .jsonl file that has one; the others are counted."""
        for line in lines:
            if not line.strip():
                continue
            place = f"{file}:{self._line}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                tally.add(MALFORMED, f"{place}: {getattr(error, 'msg', error)}")
                continue
            if not isinstance(record, dict):
                tally.add(MALFORMED, f"{place}: not a JSON object")
                continue
            values = (record.get(key) for key in self.text_keys)
            text = next((value for value in values if isinstance(value, str)), None)
            if text is None:
                keys = ", ".join(map(repr, list(record)[:5])) or "none"
                tally.add(NO_TEXT, f"{place}: its keys are {keys}")
            elif not text.strip():
                tally.add(EMPTY, place)
            else:
                yield _without_surrogates(text, place, tally)


def _whole_or_cut(lines: Iterator[str]) -> Iterator[str]:
    """The text of a .txt file: one document, or passages where it is long."""
    return passages(lines, whole=WHOLE_CHARS)


def _decode(line: bytes, place: str, tally: Tally) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        tally.add(REPLACED, f"{place}: byte {error.start + 1}")
        text = line.decode("utf-8", errors="replace")
    return text[:-2] + "\n" if text.endswith("\r\n") else text


def _without_surrogates(text: str, place: str, tally: Tally) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        tally.add(REPLACED, f"{place}: character {error.start + 1} of the text")
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _kind(file: Path) -> str:
    """The suffix below a compression's, in lower case: ".jsonl" for a.JSONL.xz."""
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
    return name.suffix.lower()


def _find(path: Path, label: str) -> tuple[list[Path], list[Path]]:
    """The files to read, sorted, and those of another kind; DataError where there is none."""
    if path.is_file():
        files = [path]
    else:
        files = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    ours = [file for file in files if _kind(file) in KINDS and file.is_file()]
    if not ours:
        raise DataError(
            f"source={label!r} holds no {' or '.join(KINDS)} file (also with"
            f" {' or '.join(COMPRESSIONS)}): name a file or folder that does"
        )
    return ours, [file for file in files if file not in set(ours)]
