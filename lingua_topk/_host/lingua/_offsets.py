"""From tokens back to the characters of the text that they came from."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from lingua.errors import DataError


def well_formed(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _character_of_byte(text: str) -> list[int]:
    """For every byte of the text in UTF-8 the index of its character; then the length."""
    is_first_byte = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
    return [*(np.cumsum(is_first_byte) - 1).tolist(), len(text)]


def offsets_of_spelling(text: str, spelling: Sequence[bytes]) -> tuple[list[str], list[int]]:
    """What every token covers and where it begins, for tokens that stand for bytes.

    `spelling` has the bytes of each token, b"" for a special one. DataError if together
    they are not the text.
    """
    if b"".join(spelling) != text.encode():
        raise DataError(
            f"the {len(spelling)} tokens do not spell the text of {len(text)} characters: give"
            " the tokens of this very text"
        )
    character_of_byte = _character_of_byte(text)
    starts = np.cumsum([0, *map(len, spelling)])
    offsets = [character_of_byte[start] for start in starts.tolist()]
    covered = [text[a:b] for a, b in pairwise(offsets)]
    return covered, offsets[:-1]


def piece_spans(message: bytes, text: str) -> list[tuple[int, int, int]]:
    """(id, start, end) of the pieces in a serialised SentencePieceText, in characters of `text`.

    The message has byte offsets into the text as it was before normalisation. Its fields
    are numbered as in SentencePiece's sentencepiece.proto.
    """
    character_of_byte = _character_of_byte(text)
    pieces = [dict(_fields(value)) for number, value in _fields(message) if number == 2]
    return [(p[2], character_of_byte[p[4]], character_of_byte[p[5]]) for p in pieces]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field of a protobuf message: an int, or bytes as they are."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
        else:
            length, at = {1: (8, at), 5: (4, at)}.get(wire_type) or _varint(message, at)
            value, at = message[at : at + length], at + length
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a byte, seven bits a byte, and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
