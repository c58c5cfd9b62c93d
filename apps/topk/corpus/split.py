"""The plain definition of what prepare keeps, holds out and shuffles, all of it in memory.

prepare itself does the same from disk (reading.py, counting.py, dealing.py), for text of any
size; the tests hold the two against each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from apps.topk.corpus.draws import (
    HELD_OUT,
    ORDER,
    content_hash,
    count_held_out,
    draw,
    seed_key,
)
from lingua_topk.errors import DataError


@dataclass(frozen=True)
class Split:
    """Distinct documents: `train` shuffled, `validation` held out."""

    train: list[str]
    validation: list[str]
    duplicates: int  # documents dropped because another had the same words


def split(
    documents: Iterable[str], val_share: float, seed: int, val_documents: int = 10**12
) -> Split:
    """Drop duplicates, hold out `val_share` of the documents that are left, shuffle the rest.

    At least one document is held out, at most `val_documents` are, and at least one is not;
    DataError when there are fewer than two. Two documents are duplicates when they differ in
    whitespace only.
    """
    key = seed_key(seed)
    kept: dict[bytes, str] = {}
    read = 0
    for document in documents:
        read += 1
        words = content_hash(document)
        # Of duplicates the least is kept, so that the order of reading does not matter.
        kept[words] = min(document, kept.get(words, document))
    if len(kept) < 2:
        raise DataError(too_few(len(kept)))
    order = sorted(kept, key=lambda words: draw(words, key, HELD_OUT))
    n_validation = count_held_out(len(kept), val_share, val_documents)
    train = sorted(order[n_validation:], key=lambda words: draw(words, key, ORDER))
    return Split(
        train=[kept[words] for words in train],
        validation=[kept[words] for words in order[:n_validation]],
        duplicates=read - len(kept),
    )


def too_few(distinct: int) -> str:
    """What is said where there is nothing to split."""
    return (
        f"the source holds {distinct} distinct document: at least 2 are needed, one to train"
        " on and one to hold out; give more text"
    )
