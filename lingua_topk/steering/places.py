"""Where in their texts the tokens stand that a model is reading.

What acts at some positions only has to know them, and a forward pass does not say: with cached
keys a batch holds the last token of every text alone, and with padding the first column is not
the first token. Whoever calls the blocks tells with `reading`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """The places of the tokens of one forward pass.

    Attributes:
        positions: int64 [B, S], from 0 at the first token of a text; negative for padding.
        prompt_lengths: int64 [B], how many tokens of each text were given and not generated; None
            where all of them were.
        texts: int64 [B], which text each row is, where rows come and go; None for their order.
    """

    positions: Tensor
    prompt_lengths: Tensor | None = None
    texts: Tensor | None = None


_CURRENT: ContextVar[Places | None] = ContextVar("lingua_topk_places", default=None)


@contextmanager
def reading(places: Places) -> Iterator[None]:
    """Within it the blocks of a model read tokens at these places."""
    token = _CURRENT.set(places)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Places | None:
    """What `reading` says, None outside of it."""
    return _CURRENT.get()
