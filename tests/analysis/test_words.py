"""Words of tokens, against a reading of the text character by character."""

import random
import unicodedata

import numpy as np
import pytest

from lingua_topk.analysis.words import words_of
from lingua_topk.errors import DataError

BYTES = [bytes([i]) for i in range(256)]


def read(pieces: list[bytes]) -> list[str | None]:
    """The word of each piece of a row that is written as a list of pieces."""
    found = words_of(np.arange(len(pieces), dtype=np.int32)[None], pieces)
    return [None if i < 0 else found.words[i] for i in found.index.tolist()]


def plain_words(pieces: list[bytes]) -> list[str | None]:
    """The definition: the last whole word that shares a byte with the piece.

    Each character is looked at in turn, and its bytes are counted by encoding it.
    """
    text = b"".join(piece or b"\0" for piece in pieces).decode("utf-8", "surrogateescape")
    owner = []  # of each byte: None, or (start, word); the word is None where it may be cut
    i = 0
    while i < len(text):
        end = i
        while end < len(text) and belongs(text, i, end):
            end += 1
        end = max(end, i + 1)
        word = text[i:end].lower().replace("\u2019", "'") if text[i].isalpha() else None
        if word is not None and (may_go_on(text[:i], "start") or may_go_on(text[end:], "end")):
            word = ""
        size = len(text[i:end].encode("utf-8", "surrogateescape"))
        owner += [None if word is None else (i, word or None)] * size
        i = end
    found, at = [], 0
    for piece in pieces:
        mine = [one for one in owner[at : at + len(piece or b"\0")] if one is not None]
        found.append(dict(mine)[max(start for start, _ in mine)] if mine else None)
        at += len(piece or b"\0")
    return found


def is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def belongs(text: str, start: int, i: int) -> bool:
    """Whether character i goes on the word that begins at `start`."""
    if text[i].isalpha():
        return True
    if i == start:
        return False
    if text[i] in "'\u2019":
        return i + 1 < len(text) and text[i + 1].isalpha()
    return is_mark(text[i])


def may_go_on(outside: str, side: str) -> bool:
    """Whether nothing outside of the word shows where it ends."""
    marks = side == "start"
    return all(
        "\udc80" <= one <= "\udcff" or one in "'\u2019" or (marks and is_mark(one))
        for one in outside
    )


def test_pieces_join_into_words():
    pieces = [b"", b" the", b" un", b"believ", b"able", b",", b" The", b" ", b" end", b".", b""]
    words = words_of(np.arange(len(pieces))[None], pieces)
    assert words.words == ["the", "unbelievable", "end"]
    assert words.index.tolist() == [-1, 0, 1, 1, 1, -1, 0, -1, 2, -1, -1]
    assert words.index.dtype == np.int32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I don't, can\u2019t", ["i", "don't", "can't"]),
        ("'quoted' o'' rock'n'roll", ["quoted", "o", "rock'n'roll"]),
        ("well-known foo_bar x2y", ["well", "known", "foo", "bar", "x", "y"]),
        ("na\u00efve \u041c\u0438\u0440", ["na\u00efve", "\u043c\u0438\u0440"]),
        ("\u6771\u4eac.", ["\u6771\u4eac"]),
        # An accent that is a character of its own; a vowel sign of Devanagari.
        ("cafe\u0301 \u0939\u093f\u0928", ["cafe\u0301", "\u0939\u093f\u0928"]),
        ("3.14 = 42 _ \U0001f600", []),
    ],
)  # fmt: skip
def test_what_a_word_is(text, words):
    tokens = np.frombuffer(f" {text} ".encode(), dtype=np.uint8)[None]
    assert words_of(tokens, BYTES).words == words


def test_every_byte_of_a_character_belongs_to_its_word():
    text = " \u00e9t\u00e9 \u6771 "
    assert read([bytes([one]) for one in text.encode()]) == [
        None, *["\u00e9t\u00e9"] * 5, None, *["\u6771"] * 3, None,
    ]  # fmt: skip


def test_special_tokens_end_words():
    assert read([b" ", b"un", b"", b"do", b" "]) == [None, "un", None, "do", None]


def test_a_token_that_touches_two_words_belongs_to_the_last():
    assert read([b" ab", b"c d", b"e."]) == ["abc", "de", "de"]
    assert read([b" ab cd ef", b" "]) == ["ef", None]


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([b"ing", b" cat", b" do"], [None, "cat", None]),  # neither edge is known
        ([b"", b"ing", b" cat", b" do", b""], [None, "ing", "cat", "do", None]),
        # Half a character, an apostrophe or an accent at the edge: the word may be longer.
        ([b"\xa9t", b" cat", b" d\xc3"], [None, "cat", None]),
        ([b"'t", b" cat", b" don'"], [None, "cat", None]),
        ([b"\xcc\x81", b"t", b" cat", b" "], [None, None, "cat", None]),
        ([b"word"], [None]),
    ],
)
def test_words_that_the_edge_of_a_row_may_cut(pieces, words):
    assert read(pieces) == words


def test_rows_are_read_for_themselves():
    pieces = [b" a", b"b", b" "]
    found = words_of(np.array([[0, 1, 2], [1, 0, 2]]), pieces)
    assert found.words == ["ab", "a"]
    assert found.index.tolist() == [0, 0, -1, -1, 1, -1]


def test_no_words_and_no_rows():
    assert words_of(np.array([[0, 0]]), [b"."]).words == []
    assert words_of(np.empty((0, 4), dtype=np.int32), [b"."]).index.tolist() == []


@pytest.mark.parametrize("token", [-1, 256])
def test_a_tokenizer_that_does_not_fit(token):
    with pytest.raises(DataError, match=rf"tokens hold {token}, .* the ids 0 to 255"):
        words_of(np.array([[5, token]]), BYTES)


@pytest.mark.parametrize("seed", range(200))
def test_as_the_plain_reading_has_it(seed):
    draw = random.Random(seed)
    alphabet = [
        "a", "B", "\u00e9", "\u6771", "\u0301", "'", "\u2019", " ", " ", "-", "7", "\U0001f600",
    ]  # fmt: skip
    raw = "".join(draw.choices(alphabet, k=30)).encode()
    raw = raw[draw.randrange(3) : len(raw) - draw.randrange(3)]
    cuts = sorted(draw.sample(range(1, len(raw)), k=12))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    for _ in range(draw.randrange(3)):
        pieces.insert(draw.randrange(len(pieces) + 1), b"")
    assert read(pieces) == plain_words(pieces)
