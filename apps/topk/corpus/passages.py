"""Cutting a long text into passages, which are the documents that are split and shuffled."""

from collections.abc import Iterable, Iterator
from itertools import chain

PASSAGE_CHARS = 6_000
# A text up to this length stays one document where its source says so.
WHOLE_CHARS = 20_000


def passages(lines: Iterable[str], size: int = PASSAGE_CHARS, whole: int = 0) -> Iterator[str]:
    """Passages of about `size` characters; a text of at most `whole` characters stays one.

    `lines` keep their line ends. A passage ends at the first blank line after `size`
    characters, or at a line end after twice that; a line longer than `size` is cut at a
    space. A short rest joins the passage before it. Nothing but blank lines around a
    passage is lost, and memory does not grow with the text.
    """
    pieces = _join_short_rest(_cut(lines, size), size // 4)
    head: list[str] = []
    for piece in pieces:
        head.append(piece)
        if sum(map(len, head)) > whole:
            break
    else:
        head = ["".join(head)]
    for piece in chain(head, pieces):
        if piece.strip():
            yield piece.strip("\n")


def _cut(lines: Iterable[str], size: int) -> Iterator[str]:
    parts: list[str] = []
    length = 0
    for line in lines:
        for part in _parts(line, size):
            parts.append(part)
            length += len(part)
            if length >= 2 * size or (length >= size and not part.strip()):
                yield "".join(parts)
                parts, length = [], 0
    if parts:
        yield "".join(parts)


def _parts(line: str, size: int) -> Iterator[str]:
    start = 0
    while len(line) - start > size:
        end = line.rfind(" ", start, start + size) + 1 or start + size
        yield line[start:end]
        start = end
    yield line[start:]


def _join_short_rest(pieces: Iterable[str], short: int) -> Iterator[str]:
    held = None
    for piece in pieces:
        if held is None:
            held = piece
        elif len(piece) < short:  # only the last one can be
            held += piece
        else:
            yield held
            held = piece
    if held is not None:
        yield held
