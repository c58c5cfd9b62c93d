"""Words in a text, as an analysis has them, and which of them are a concept's."""

from collections.abc import Collection, Iterator
from itertools import groupby

import numpy as np

from lingua_topk.analysis.words import words_of

WHOLE = b""  # a special token: what ends there is a whole word


def words_in(text: str) -> Iterator[tuple[str, int, int]]:
    """Every word of a text, lower-cased, with its first character and its end."""
    spelled = [WHOLE, *(character.encode("utf-8", "surrogatepass") for character in text), WHOLE]
    found = words_of(np.arange(len(spelled))[None], spelled)  # each character a token of its own
    start = 0
    for index, run in groupby(found.index[1:-1].tolist()):
        end = start + len(list(run))
        if index >= 0:
            yield found.words[index], start, end
        start = end


def spans_of(words: Collection[str], text: str, first: int = 0) -> list[tuple[int, int]]:
    """Where in `text` these words stand, what lies behind `first` of them."""
    return [
        (max(start, first), end)
        for word, start, end in words_in(text)
        if word in words and end > first
    ]


def count(words: Collection[str], prompt: str, text: str) -> tuple[int, int]:
    """How many words of `text`, which follows on `prompt`, are among `words`, and of how many.

    A word that the prompt begins counts.
    """
    found = [word for word, _, end in words_in(prompt + text) if end > len(prompt)]
    return sum(word in words for word in found), len(found)
