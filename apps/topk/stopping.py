"""The text of tokens that come one at a time: let out as soon as it is certain, and stopped.

A character may need several tokens, and until the last one a tokenizer writes replacements
for its bytes; a stop string may begin in one token and end in another. What could still
change, or turn out to begin a stop string, is held back.
"""

import re
from collections.abc import Callable, Sequence
from itertools import takewhile

# What stands for the bytes of a character that is not complete, which are three at most. Of
# text that ends like this by itself the same is held back, for one token.
_INCOMPLETE = re.compile(r"(?:\ufffd|\\x[0-9a-f]{2}){1,3}\Z")


class TextStream:
    """What is added to the text of a prompt.

    Attributes:
        text: what has been let out.
        is_stopped: whether a stop string was found; the text ends before it.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop: Sequence[str]
    ):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids = list(prompt)
        # Text is what ids[start:] decode to beyond ids[start:anchor]: not the whole text each
        # time, and not the new tokens alone, whose first space some tokenizers drop.
        self._start, self._anchor = 0, len(self._ids)
        self._before = decode(self._ids)
        self._n_taken = 0  # characters after the anchor that are in `_held` or let out
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with one more token; "" while there is none."""
        self._ids.append(token)
        added = self._added()
        incomplete = _INCOMPLETE.search(added)
        piece = self._let_out(self._taken(added[: incomplete.start()] if incomplete else added))
        if added and not incomplete:
            self._move_anchor()
        return piece

    def finish(self) -> str:
        """The rest of the text: no further token comes."""
        if self.is_stopped:
            return ""
        piece = self._let_out(self._taken(self._added()))
        if not self.is_stopped:
            self.text, piece, self._held = self.text + self._held, piece + self._held, ""
        return piece

    def _added(self) -> str:
        """The text of the tokens after the anchor."""
        text = self._decode(self._ids[self._start :])
        if text.startswith(self._before):
            return text[len(self._before) :]
        # The prompt ended within a character, which is complete now.
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(text, self._before, strict=False))
        return text[sum(1 for _ in shared) :]

    def _taken(self, certain: str) -> str:
        """What of the text after the anchor was not there before."""
        new = certain[self._n_taken :]
        self._n_taken += len(new)
        return new

    def _move_anchor(self) -> None:
        if self._decode(self._ids[self._anchor :]):  # with a space alone the next would drop its
            self._start = self._anchor
        self._anchor = len(self._ids)
        self._before = self._decode(self._ids[self._start :])
        self._n_taken = 0

    def _let_out(self, new: str) -> str:
        """Add new text to what is held; what of that can be let out."""
        self._held += new
        found = [place for one in self._stop if (place := self._held.find(one)) >= 0]
        if found:
            self.is_stopped = True
            size = min(found)
        else:
            size = len(self._held) - _n_begun(self._held, self._stop)
        piece, self._held = self._held[:size], self._held[size:]
        self.text += piece
        return piece


def _n_begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` are the beginning of a stop string."""
    longest = max((len(one) - 1 for one in stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-size:]) for one in stop):
            return size
    return 0
