"""Documents from JSON lines: one process's share of the files of a source, for ever.

A line that cannot be used is passed over, counted and reported; a file with too large a share
of malformed lines, a share without a single document, and a file that is cut, replaced or
taken away while it is read, are DataErrors.
"""

import codecs
import json
import logging
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, TypedDict

from lingua._tally import MAX_MALFORMED_SHARE, Tally
from lingua._watched import READ_BUFFER, WatchedFiles, changed, shown, unreadable
from lingua.errors import DataError

logger = logging.getLogger(__name__)

TEXT_KEYS = ("text", "content")  # in the order of preference
# A file without line ends, such as one large JSON array, would fill the memory.
MAX_LINE_BYTES = 1 << 30  # no less than READ_BUFFER


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

    With `line` and `malformed` a resumed run judges a file by all lines of the pass, as the
    uninterrupted one does; only a document that the tokenizer refused is missing in a state
    from before the next line was read. In a state of Lingua both are absent, and the file is
    judged by the lines from `position` on. How strict to be is a setting, and in no state.
    """

    line: int  # index of the line at `position`
    malformed: int  # lines of this part and pass before `position`; absent for 0
    size: int  # bytes of the file
    parts: list[JSONLPart]
    part: int
    begun: list[list[int]]  # [byte, line] a part: where this pass begins in it, if not at its start


class Document(dict):
    """The JSON object of a line. Who finds it of no use says so by `reject`."""

    rejected: str | None = None  # why
    malformed = False  # whether that counts as a malformed line

    def reject(self, reason: str, malformed: bool = False) -> None:
        """What stands before a colon in `reason` is its kind, by which documents are counted."""
        self.rejected, self.malformed = reason, malformed


class _UnusableLine(Exception):
    """Its text is the reason why a line is no document."""

    def __init__(self, reason: str, malformed: bool = True):
        super().__init__(reason)
        self.malformed = malformed


def text_of(content: dict) -> str | None:
    """The text of a document, or None."""
    for key in TEXT_KEYS:
        if isinstance(content.get(key), str):
            return content[key]
    return None


def _parse(line: bytes) -> Document:
    line = line.rstrip()
    if not line:
        raise _UnusableLine("empty", malformed=False)
    try:
        content = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _UnusableLine("not UTF-8") from None
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise _UnusableLine(f"not JSON: {what} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # too long a number, too deep a nesting
        raise _UnusableLine(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _UnusableLine("not a JSON object")
    if text_of(content) is None:
        raise _UnusableLine(f"no string under {' or '.join(map(repr, TEXT_KEYS))}")
    return Document(content)


def _read_part(
    part: JSONLPart,
    position: int,
    line: int,
    tally: Tally,
    files: WatchedFiles,
    size_then: int | None,
) -> Iterator[tuple[Document, int, int]]:
    """The documents of one pass, each with position and index of the line after it."""
    path = part["file_path"]
    try:
        file = files.open_at(path, position, size_then)
    except OSError as error:
        raise unreadable(path, position, error) from None
    with file:
        yield from _read_lines(file, part, position, line, tally, files)
    tally.finish_file()


def _read_lines(
    file: BinaryIO, part: JSONLPart, position: int, line: int, tally: Tally, files: WatchedFiles
) -> Iterator[tuple[Document, int, int]]:
    """`_read_part` of an open file, up to where it ended when it was opened.

    So that a pass has an end, however fast the file grows.
    """
    path, block_size, size = part["file_path"], part["block_size"], files.size
    first, stop = part["offset"], part["offset"] + part["n_offsets"]
    pause = min(position + READ_BUFFER, size)
    try:
        for raw in iter(partial(file.readline, MAX_LINE_BYTES), b""):
            start, index = position, line
            position, line = position + len(raw), line + 1
            # Most lines may be those of other readers: one comparison is all they cost.
            if position >= pause:
                if start >= size:
                    position = start
                    break
                if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    raise _too_long(path, start)
                files.check(file, path, start)
                pause = min(position + READ_BUFFER, size)
            if not first <= index % block_size < stop:
                continue
            tally.count_line()
            try:
                document = _parse(raw if start else raw.removeprefix(codecs.BOM_UTF8))
            except _UnusableLine as error:
                files.check(file, path, start)  # it may have been a good one
                tally.skip(index, position, str(error), error.malformed)
                continue
            yield document, position, line
            if document.rejected:
                tally.skip(index, position, document.rejected, document.malformed)
        files.check(file, path, position)
    except OSError as error:
        raise unreadable(path, position, error) from None
    if position < size:
        raise changed(path, position, "came to an end")


def _too_long(path: str, start: int) -> DataError:
    return DataError(
        f"{shown(path)}: the line that begins at byte {start} has more than {MAX_LINE_BYTES} bytes:"
        ' write one JSON object with a "text" a line'
    )


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
    parts: list[JSONLPart],
    part: int,
    position: int,
    line: int | None,
    current_iter: int,
    malformed: int = 0,
    size: int | None = None,
    begun: list[list[int]] | None = None,
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
    if malformed:
        state["malformed"] = malformed
    if size is not None:
        state["size"] = size
    if len(parts) > 1 or current["n_offsets"] > 1:
        state["parts"], state["part"] = parts, part
    if begun:
        state["begun"] = begun
    return state


def _n_before(part: JSONLPart, line: int) -> int:
    """How many of the first `line` lines of the file are of this part."""
    n_blocks, rest = divmod(line, part["block_size"])
    return n_blocks * part["n_offsets"] + min(max(rest - part["offset"], 0), part["n_offsets"])


def _read_rest(
    state: JSONLState, tally: Tally, files: WatchedFiles
) -> Iterator[tuple[Document, JSONLState]]:
    """What is left of a pass over a share; each document with the state after it."""
    parts, current_iter = parts_of(state), state["current_iter"]
    position, numbered = state["position"], "line" in state or state["position"] == 0
    # Without a line number the line is known modulo block_size, which is enough to go on.
    line = state.get("line", 0 if position == 0 else state["offset"] + 1)
    malformed, size_then = state.get("malformed", 0), state.get("size")
    begun = state.get("begun")
    for index in range(state.get("part", 0), len(parts)):
        part = parts[index]
        n_judged = _n_before(part, line) if numbered else 0
        tally.start_file(part["file_path"], position, numbered, n_judged, malformed)
        for document, after, next_line in _read_part(part, position, line, tally, files, size_then):
            number = next_line if numbered else None
            yield (
                document,
                _state(
                    parts, index, after, number, current_iter, tally.n_malformed, files.size, begun
                ),
            )
        position, line = begun[index + 1] if begun and index + 1 < len(parts) else (0, 0)
        numbered, malformed, size_then = True, 0, None


def read_share(
    state: JSONLState, max_malformed: float = MAX_MALFORMED_SHARE
) -> Iterator[tuple[Document, JSONLState]]:
    """The documents of a share from `state` on, without end; each with the state after it.

    max_malformed: the share of a file's lines, from 0 to 1, that may be malformed. DataError
    beyond it, and where a whole pass finds no usable document.
    """
    tally, files = Tally(max_malformed), WatchedFiles()
    while True:
        is_at_start = state["position"] == 0 and state.get("part", 0) == 0
        is_whole_pass = is_at_start and "begun" not in state
        n_usable = 0
        for document, after in _read_rest(state, tally, files):
            yield document, after
            n_usable += document.rejected is None
        parts, n_passes = parts_of(state), state["current_iter"] + 1
        if is_whole_pass and n_usable == 0:
            raise DataError(_why_empty(parts, tally))
        tally.finish_pass(_name(parts), n_passes, is_whole_pass)
        state = _state(parts, 0, position=0, line=0, current_iter=n_passes)


def _name(parts: list[JSONLPart]) -> str:
    """The files of a share in a few words."""
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    return shown(parts[0]["file_path"]) + more


def _why_empty(parts: list[JSONLPart], tally: Tally) -> str:
    if tally.first:
        return (
            f"{_name(parts)}: no usable document in the lines that this process reads (first of"
            f' all: {tally.first}): write one JSON object with a "text" a line'
        )
    return (
        f"{_name(parts)}: no line for this process, which reads {parts[0]['n_offsets']} of every"
        f" {parts[0]['block_size']} lines from index {parts[0]['offset']} on: use fewer processes,"
        " or files with more lines"
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
    return _read_rest(state, Tally(MAX_MALFORMED_SHARE), WatchedFiles())


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
