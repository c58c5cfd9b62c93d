"""What is drawn for a document: its place in the shuffle, and whether it is held out.

Everything is decided by the document's words and the seed: neither the order of the files
nor the names they have play a part.
"""

import hashlib

BYTES = 16  # of a hash and of a draw
HELD_OUT = b"held out"
ORDER = b"order"


def content_hash(document: str) -> bytes:
    """16 bytes that documents of the same words, in the same order, share."""
    words = " ".join(document.split())
    return hashlib.blake2b(words.encode("utf-8"), digest_size=BYTES).digest()


def seed_key(seed: int) -> bytes:
    """The key that makes the draws of one seed differ from those of another."""
    return hashlib.blake2b(b"%d" % seed, digest_size=BYTES).digest()


def draw(words: bytes, key: bytes, purpose: bytes) -> bytes:
    """A number, as 16 bytes, drawn from a content hash, a seed's key and what it is for."""
    return hashlib.blake2b(words, key=key, person=purpose, digest_size=BYTES).digest()


def count_held_out(distinct: int, share: float, limit: int) -> int:
    """How many of `distinct` documents are held out: a share, but 1 to `limit`, and never all."""
    return min(max(round(share * distinct), 1), limit, distinct - 1)
