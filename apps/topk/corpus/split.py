"""Which documents are kept, which are held out, and in which order the others come.

Everything is decided by the documents' content and the seed: neither the order of the
files nor the names they have play a part.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from lingua_topk.errors import DataError


@dataclass(frozen=True)
class Split:
    """Distinct documents: `train` shuffled, `validation` held out."""

    train: list[str]
    validation: list[str]
    duplicates: int  # documents dropped because another had the same words


def split(documents: Iterable[str], val_share: float, seed: int) -> Split:
    """Drop duplicates, hold out `val_share` of the documents that are left, shuffle the rest.

    At least one document is held out and at least one is not; DataError when there are
    fewer than two. Two documents are duplicates when they differ in whitespace only.
    """
    # All documents are held in memory here, and nowhere else: a corpus larger than
    # memory needs another version of this function and of nothing around it.
    kept: dict[bytes, str] = {}
    read = 0
    for document in documents:
        read += 1
        words = content_hash(document)
        # Of duplicates the least is kept, so that the order of reading does not matter.
        kept[words] = min(document, kept.get(words, document))
    if len(kept) < 2:
        raise DataError(
            f"the source holds {len(kept)} distinct document: at least 2 are needed, one to train"
            " on and one to hold out; give more text"
        )
    order = sorted(kept, key=lambda words: _draw(words, seed, b"held out"))
    n_validation = min(max(round(val_share * len(kept)), 1), len(kept) - 1)
    train = sorted(order[n_validation:], key=lambda words: _draw(words, seed, b"order"))
    return Split(
        train=[kept[words] for words in train],
        validation=[kept[words] for words in order[:n_validation]],
        duplicates=read - len(kept),
    )


def content_hash(document: str) -> bytes:
    """16 bytes that documents of the same words, in the same order, share."""
    words = " ".join(document.split())
    return hashlib.blake2b(words.encode("utf-8"), digest_size=16).digest()


def _draw(words: bytes, seed: int, purpose: bytes) -> bytes:
    """A number, as bytes, drawn from a document's hash, the seed and what it is for."""
    key = hashlib.blake2b(b"%d" % seed, digest_size=16).digest()
    return hashlib.blake2b(words, key=key, person=purpose, digest_size=16).digest()
