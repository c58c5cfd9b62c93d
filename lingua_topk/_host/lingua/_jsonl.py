"""Documents from JSON lines: one process's share of the files of a source, for ever.

A line that cannot be used is passed over, counted and reported; a file that is mostly
such lines, and a share without a single document, are DataErrors.
"""

import codecs
import json
import logging
import os
from collections.abc import Iterator
from typing import BinaryIO, TypedDict

from lingua.errors import DataError

logger = logging.getLogger(__name__)

# A file is refused once more than this share of the lines read are malformed; fewer lines
# than MIN_LINES_TO_JUDGE are judged as if so many had been read.
MAX_MALFORMED_SHARE = 0.1
MIN_LINES_TO_JUDGE = 100
# Skipped lines of a source that are reported one by one; the others are only counted.
N_REPORTED_LINES = 5

TEXT_KEYS = ("text", "content")  # in the order of preference
_READ_BUFFER = 1 << 20  # bytes


class JSONLPart(TypedDict):
    """Some lines of a file: those with index % block_size in [offset, offset + n_offsets)."""

    file_path: str
    block_size: int
    offset: int
    n_offsets: int


class _OneFileState(TypedDict):
    """Lingua's state: n_offsets is 1, and the line before `position` was of this part."""

    file_path: str
    position: int  # bytes
    block_size: int
    offset: int
    current_iter: int  # how often the whole share has been read


class JSONLState(_OneFileState, total=False):
    """Where a process is in its share of a source. The keys here are absent in Lingua's states.

    The first five keys describe the part being read. A process with more than one part,
    or one with n_offsets > 1, has all of them in `parts` and the current one's index in
    `part`, and reads them in turn.
    """

    line: int  # index of the line at `position`
    parts: list[JSONLPart]
    part: int


class Document(dict):
    """The JSON object of a line. Who finds it of no use says why in `rejected`."""

    rejected: str | None = None


class _MalformedLine(Exception):
    """The reason why a line is no document."""


def text_of(content: dict) -> str | None:
    """The text of a document, or None."""
    for key in TEXT_KEYS:
        if isinstance(content.get(key), str):
            return content[key]
    return None


def _parse(line: bytes) -> Document:
    try:
        content = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _MalformedLine("not UTF-8") from None
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise _MalformedLine(f"not JSON: {what} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # too long a number, too deep a nesting
        raise _MalformedLine(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _MalformedLine("not a JSON object")
    if text_of(content) is None:
        raise _MalformedLine(f"no string under {' or '.join(map(repr, TEXT_KEYS))}")
    return Document(content)


class _SkippedLines:
    """Counts the lines of a share that are passed over, and reports them without a flood."""

    def __init__(self):
        self._n_reported = 0
        self._files_done: set[str] = set()
        self.first = ""  # the first skipped line and the reason

    def start_file(self, path: str, numbered: bool) -> None:
        """`numbered`: whether line numbers are known, or only byte positions."""
        self._path, self._numbered = path, numbered
        self._n_read = self._n_skipped = self._n_malformed = 0

    def count_line(self) -> None:
        self._n_read += 1

    def skip(self, index: int, position: int, reason: str, malformed: bool = False) -> None:
        place = f"line {index + 1}" if self._numbered else f"line before byte {position}"
        self._n_skipped += 1
        self.first = self.first or f"{self._path} {place}: {reason}"
        if self._path not in self._files_done and self._n_reported < N_REPORTED_LINES:
            self._n_reported += 1
            logger.warning("skipped %s %s: %s", self._path, place, reason)
        if malformed:
            self._n_malformed += 1
            self._judge()

    def _judge(self) -> None:
        if self._n_malformed > MAX_MALFORMED_SHARE * max(self._n_read, MIN_LINES_TO_JUDGE):
            raise DataError(
                f"{self._path}: {self._n_malformed} of the first {self._n_read} lines read are"
                f" malformed, more than {MAX_MALFORMED_SHARE:.0%} (first of all: {self.first}):"
                ' write one JSON object with a "text" a line'
            )

    def finish_file(self) -> None:
        if self._n_skipped and self._path not in self._files_done:
            logger.warning(
                "%s: skipped %d of the %d lines read", self._path, self._n_skipped, self._n_read
            )
        self._files_done.add(self._path)


def _open_at(path: str, position: int) -> BinaryIO:
    """The file, at the beginning of a line. DataError if there is none at `position`."""
    try:
        file = open(path, "rb", buffering=_READ_BUFFER)  # noqa: SIM115  (the caller closes it)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): put it back, or start a new run on the"
            " files that are there"
        ) from None
    size = os.fstat(file.fileno()).st_size
    file.seek(max(position - 1, 0))
    at_line_start = position == 0 or file.read(1) == b"\n" or position == size
    if position > size or not at_line_start:
        file.close()
        raise DataError(
            f"{path} has no line that begins at byte {position}, where reading stopped before: it"
            " was changed since; restore it, or start a new run"
        )
    return file


def _read_part(
    part: JSONLPart, position: int, line: int, skipped: _SkippedLines
) -> Iterator[tuple[Document, int, int]]:
    """The documents of one pass, each with position and index of the line after it."""
    first, stop, block_size = part["offset"], part["offset"] + part["n_offsets"], part["block_size"]
    with _open_at(part["file_path"], position) as file:
        for raw in file:
            is_bom_line = position == 0
            index, line = line, line + 1
            position += len(raw)
            if not first <= index % block_size < stop:
                continue
            skipped.count_line()
            content = raw.removeprefix(codecs.BOM_UTF8) if is_bom_line else raw
            content = content.rstrip()
            if not content:
                skipped.skip(index, position, "empty")
                continue
            try:
                document = _parse(content)
            except _MalformedLine as reason:
                skipped.skip(index, position, str(reason), malformed=True)
                continue
            yield document, position, line
            if document.rejected:
                skipped.skip(index, position, document.rejected)
    skipped.finish_file()


def parts_of(state: JSONLState) -> list[JSONLPart]:
    """All parts of a share; a state by Lingua has one."""
    one = JSONLPart(
        file_path=state["file_path"],
        block_size=state["block_size"],
        offset=state["offset"],
        n_offsets=1,
    )
    return state.get("parts") or [one]


def start_of(parts: list[JSONLPart]) -> JSONLState:
    """The state of a share of which nothing has been read."""
    return _state(parts, 0, position=0, line=0, current_iter=0)


def _state(
    parts: list[JSONLPart], part: int, position: int, line: int | None, current_iter: int
) -> JSONLState:
    current = parts[part]
    state = JSONLState(
        file_path=current["file_path"],
        position=position,
        block_size=current["block_size"],
        offset=current["offset"],
        current_iter=current_iter,
    )
    if line is not None:
        state["line"] = line
    if len(parts) > 1 or current["n_offsets"] > 1:
        state["parts"], state["part"] = parts, part
    return state


def _read_rest(state: JSONLState, skipped: _SkippedLines) -> Iterator[tuple[Document, JSONLState]]:
    """What is left of a pass over a share; each document with the state after it."""
    parts, current_iter = parts_of(state), state["current_iter"]
    position, numbered = state["position"], "line" in state or state["position"] == 0
    # Without a line number the line is known modulo block_size, which is enough to go on.
    line = state.get("line", 0 if position == 0 else state["offset"] + 1)
    for part in range(state.get("part", 0), len(parts)):
        skipped.start_file(parts[part]["file_path"], numbered)
        for document, after, next_line in _read_part(parts[part], position, line, skipped):
            number = next_line if numbered else None
            yield document, _state(parts, part, after, number, current_iter)
        position, line, numbered = 0, 0, True


def read_share(state: JSONLState) -> Iterator[tuple[Document, JSONLState]]:
    """The documents of a share from `state` on, without end; each with the state after it.

    DataError where a whole pass finds no usable document.
    """
    skipped = _SkippedLines()
    while True:
        is_whole_pass = state["position"] == 0 and state.get("part", 0) == 0
        n_usable = 0
        for document, after in _read_rest(state, skipped):
            yield document, after
            n_usable += document.rejected is None
        if is_whole_pass and n_usable == 0:
            raise DataError(_why_empty(parts_of(state), skipped))
        parts = parts_of(state)
        state = _state(parts, 0, position=0, line=0, current_iter=state["current_iter"] + 1)


def _why_empty(parts: list[JSONLPart], skipped: _SkippedLines) -> str:
    part = parts[0]
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    if skipped.first:
        return (
            f"{part['file_path']}{more}: no usable document in the lines that this process reads"
            f' (first of all: {skipped.first}): write one JSON object with a "text" a line'
        )
    return (
        f"{part['file_path']}{more}: no line for this process, which reads {part['n_offsets']} of"
        f" every {part['block_size']} lines from index {part['offset']} on: use fewer processes, or"
        " files with more lines"
    )


def read_jsonl(
    file_path: str, position: int, block_size: int, offset: int, current_iter: int
) -> Iterator[tuple[Document, JSONLState]]:
    """From `position` to the end of one file: lines with index % block_size == offset."""
    state = JSONLState(
        file_path=file_path,
        position=position,
        block_size=block_size,
        offset=offset,
        current_iter=current_iter,
    )
    return _read_rest(state, _SkippedLines())


def loop_on_jsonl(
    file_path: str, position: int, block_size: int, offset: int, current_iter: int
) -> Iterator[tuple[Document, JSONLState]]:
    """`read_jsonl` without end; current_iter counts the passes."""
    state = JSONLState(
        file_path=file_path,
        position=position,
        block_size=block_size,
        offset=offset,
        current_iter=current_iter,
    )
    return read_share(state)
