"""The words of a corpus of tokens: which word each token is a part of.

A word is a run of letters of any script, with the marks that combine with them (accents, vowel
signs), and with apostrophes between letters: "naïve" and "don't" are one word each. All else ends
a word: spaces, hyphens, digits, underscores, bytes that are no UTF-8, and special tokens. Words
are lower-cased, and a curly apostrophe becomes a straight one. A script without spaces gives
words as long as its sentences.
"""

import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from lingua_topk.errors import DataError

CURLY = "\u2019"
APOSTROPHES = "'" + CURLY
# What stands for a special token in the text of a row: one byte that is part of no word.
SPECIAL = b"\0"
# How `surrogateescape` decodes the bytes 0x80 to 0xff where they are no UTF-8, each for itself.
STRAY_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))


@dataclass(frozen=True)
class Words:
    """The words of a corpus and where they stand.

    Attributes:
        words: the distinct words, lower-cased, [W], in the order in which they first appear.
        index: int32 [N * S], the word that the token at a place is a part of; -1 where it is in
            none, or in one that the edge of the row may cut.
    """

    words: list[str]
    index: np.ndarray


def words_of(tokens: np.ndarray, pieces: Sequence[bytes]) -> Words:
    """The words of rows of tokens; a row is read for itself.

    A token that touches two words belongs to the last of them. A word at the edge of a row counts
    only where a special token, or a character that ends words, shows that it is whole.

    Args:
        tokens: int [N, S].
        pieces: what each token spells, in UTF-8 or a part of a character's; b"" for special
            tokens, [V].

    Raises: DataError for a token outside [0, V).
    """
    _check(tokens, len(pieces))
    spelled = [piece or SPECIAL for piece in pieces]
    lengths = np.array([len(piece) for piece in spelled], dtype=np.int64)  # [V]
    ids: dict[str, int] = {}
    index = np.full(tokens.shape, -1, dtype=np.int32)
    for row, found in zip(tokens, index, strict=True):
        text = b"".join([spelled[token] for token in row.tolist()])
        word_ids, starts, ends = _words_of_text(text, ids)  # [w] each
        if not len(word_ids):
            continue
        token_ends = np.cumsum(lengths[row])  # [S], in bytes
        token_starts = token_ends - lengths[row]
        # The last word that begins before the token's end, where it ends behind its start.
        last = np.searchsorted(starts, token_ends) - 1
        touched = (last >= 0) & (ends[last] > token_starts)
        found[touched] = word_ids[last[touched]]
    return Words(list(ids), index.reshape(-1))


def _check(tokens: np.ndarray, n_pieces: int) -> None:
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < n_pieces:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(
            f"tokens hold {wrong}, and the tokenizer has the ids 0 to {n_pieces - 1}: give the"
            " tokenizer that the tokens were made with"
        )


def _words_of_text(row: bytes, ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, first byte and end of the words of a row, int64 [w] each; new words go into `ids`.

    A word that the edge may cut has the index -1.
    """
    text = row.decode("utf-8", "surrogateescape")
    word, edge = _patterns()
    # Letters right behind these, or right before them, may go on in what the row does not show.
    first = edge.match(text).end()
    last = len(text.rstrip(STRAY_BYTES + APOSTROPHES))
    found, starts, ends = [], [], []
    for match in word.finditer(text):
        start, end = match.span()
        is_cut = start <= first or end >= last
        found.append(-1 if is_cut else ids.setdefault(_key(match[0]), len(ids)))
        starts.append(start)
        ends.append(end)
    starts, ends = np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
    if not text.isascii():
        offsets = _byte_offsets(text)
        starts, ends = offsets[starts], offsets[ends]
    return np.array(found, dtype=np.int64), starts, ends


def _key(word: str) -> str:
    return word.lower().replace(CURLY, "'")


def _byte_offsets(text: str) -> np.ndarray:
    """Where each character begins in the bytes that were decoded, and their end; int64 [n + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    widths[(codes >= 0xDC80) & (codes < 0xDD00)] = 1  # a stray byte
    return np.concatenate([[0], np.cumsum(widths)])


@cache
def _patterns() -> tuple[re.Pattern, re.Pattern]:
    """A word, and what at the start of a row may belong to a word that began before it."""
    letter, marks = r"[^\W\d_]", _marks()
    run = f"{letter}(?:{letter}|[{marks}])*"
    word = re.compile(f"{run}(?:[{APOSTROPHES}]{run})*")
    return word, re.compile(f"[{marks}{STRAY_BYTES}{APOSTROPHES}]*")


def _marks() -> str:
    """The combining marks of Unicode, as ranges of a character class: `re` has no name for them."""
    codes = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] == "M"]
    starts = [c for c, before in zip(codes, [-1, *codes], strict=False) if c != before + 1]
    ends = [c for c, behind in zip(codes, [*codes[1:], -1], strict=True) if c != behind - 1]
    return "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, ends, strict=True))
