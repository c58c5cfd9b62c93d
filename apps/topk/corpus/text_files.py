"""Documents from one .txt or .jsonl file, plain or compressed with gzip, xz or zstd.

Files are read as UTF-8, line by line. Bytes that are no UTF-8, and lone surrogates
that a JSON escape can hold, become U+FFFD; the lines are counted and named.
"""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from apps.topk.corpus.mending import decode, without_surrogates
from apps.topk.corpus.passages import WHOLE_CHARS, passages
from apps.topk.corpus.tally import Tally
from lingua_topk.errors import DataError

KINDS = (".txt", ".jsonl")

MALFORMED = "malformed lines skipped"
NO_TEXT = "lines without the text key skipped"
EMPTY = "empty documents skipped"

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BLOCK = 1 << 20  # bytes


def _open_zstd(raw: BinaryIO) -> Any:
    # pyarrow comes with datasets, and says so when a file ends early.
    import pyarrow

    return pyarrow.CompressedInputStream(raw, "zstd")


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
_DAMAGES = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)


class TextFile:
    """The documents of one file, from its beginning or from a `position` given before.

    `position` is JSON, and holds after every document; `read` is the number of lines read,
    `done` the bytes of the file as stored.
    """

    unit = "lines"

    def __init__(self, file: Path, text_keys: list[str], tally: Tally, position: Any = None):
        self.file, self.text_keys, self.tally = file, text_keys, tally
        self.is_jsonl = kind(file) == ".jsonl"
        self.done = 0
        start = position or {}
        self.read = start.get("line", 0)
        self._offset = start.get("offset", 0)  # in the uncompressed file
        self._documents = start.get("documents", 0)

    @property
    def position(self) -> dict[str, int]:
        # The passages of a .txt file are cut anew from its beginning: where the next one
        # starts depends on lines that were read ahead.
        if self.is_jsonl:
            return {"line": self.read, "offset": self._offset}
        return {"documents": self._documents}

    def documents(self) -> Iterator[str]:
        """Every document that is left; DataError where the file is damaged."""
        if self.is_jsonl:
            yield from self._texts()
            return
        pieces = passages(self._lines(), whole=WHOLE_CHARS)
        tally, self.tally = self.tally, Tally()
        for _ in islice(pieces, self._documents):
            pass  # had before, and what was met on the way is counted
        self.tally = tally
        for piece in pieces:
            self._documents += 1
            yield piece

    def _lines(self) -> Iterator[str]:
        """The lines with their ends, \\r\\n made \\n."""
        try:
            with open(self.file, "rb") as raw:
                for line in self._opened(raw):
                    self.read += 1
                    self._offset += len(line)
                    if self.read == 1:
                        if line.startswith(_UTF16_MARKS):
                            raise DataError(f"{self.file} is UTF-16: convert it to UTF-8")
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    text = decode(line, f"{self.file}:{self.read}", self.tally)
                    yield text[:-2] + "\n" if text.endswith("\r\n") else text
                    self.done = raw.tell()
        except _DAMAGES as error:
            raise DataError(self._damaged(error)) from None
        except OSError as error:
            if error.errno is None:  # not from the file system: from a decompressor
                raise DataError(self._damaged(error)) from None
            raise DataError(f"{self.file} cannot be read: {error.strerror or error}") from None

    def _opened(self, raw: BinaryIO) -> BinaryIO:
        """The uncompressed file, where reading goes on."""
        opener = COMPRESSIONS.get(self.file.suffix.lower())
        if not opener:
            raw.seek(self._offset)
            return raw
        stream = io.BufferedReader(opener(raw), _BLOCK)
        left = self._offset
        while left and (block := stream.read(min(left, _BLOCK))):
            left -= len(block)
        return stream

    def _damaged(self, error: Exception) -> str:
        return (
            f"{self.file} is damaged or truncated after line {self.read:,} ({error}): get a"
            " whole copy"
        )

    def _texts(self) -> Iterator[str]:
        """The text of every line of a .jsonl file that has one; the others are counted."""
        for line in self._lines():
            if not line.strip():
                continue
            place = f"{self.file}:{self.read}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.tally.add(MALFORMED, f"{place}: {getattr(error, 'msg', error)}")
                continue
            if not isinstance(record, dict):
                self.tally.add(MALFORMED, f"{place}: not a JSON object")
                continue
            text = first_text(record, self.text_keys)
            if text is None:
                keys = ", ".join(map(repr, list(record)[:5])) or "none"
                self.tally.add(NO_TEXT, f"{place}: its keys are {keys}")
            elif not text.strip():
                self.tally.add(EMPTY, place)
            else:
                yield without_surrogates(text, place, self.tally)


def first_text(record: dict[str, Any], text_keys: list[str]) -> str | None:
    """The value of the first of `text_keys` that holds text in `record`."""
    values = (record.get(key) for key in text_keys)
    return next((value for value in values if isinstance(value, str)), None)


def kind(file: Path) -> str:
    """The suffix below a compression's, in lower case: ".jsonl" for a.JSONL.xz."""
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
    suffix = name.suffix.lower()
    # A compressed .parquet file is of no kind that is read.
    return suffix if name == file or suffix in KINDS else file.suffix.lower()
