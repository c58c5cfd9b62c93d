"""Between the passes: how many documents are distinct, and which of them are held out."""

from collections.abc import Iterator
from dataclasses import dataclass

from apps.topk.corpus import progress
from apps.topk.corpus.draws import count_held_out
from apps.topk.corpus.records import BUCKETS, Records
from apps.topk.corpus.split import too_few
from lingua_topk.errors import DataError

_BINS = 1 << 16  # of the draws for validation, by their first two bytes


@dataclass(frozen=True)
class Plan:
    """`held_out` of the `distinct` documents are: those with a draw up to `last`."""

    distinct: int
    held_out: int
    last: bytes


def plan(records: Records, share: float, most: int, limit: int) -> Plan:
    """What is held out: `share` of the distinct documents, at least one and at most `most`.

    Reads the records twice, about `limit` bytes at a time, and keeps no draws but those of
    one bin. DataError for fewer than two distinct documents.
    """
    counts = [0] * _BINS
    for draws in _distinct(records, limit, "counting"):
        for draw in draws:
            counts[_bin(draw)] += 1
    distinct = sum(counts)
    if distinct < 2:
        raise DataError(too_few(distinct))
    held_out = count_held_out(distinct, share, most)
    edge, below = 0, 0  # the bin that the last one is in, and how many come before it
    while below + counts[edge] < held_out:
        below += counts[edge]
        edge += 1
    in_edge = {
        draw
        for draws in _distinct(records, limit, "holding out")
        for draw in draws
        if _bin(draw) == edge
    }
    return Plan(distinct, held_out, sorted(in_edge)[held_out - below - 1])


def _distinct(records: Records, limit: int, what: str) -> Iterator[set[bytes]]:
    """The draws for validation of distinct documents, some at a time."""
    weights = records.weights()
    for bucket in progress.ticking(range(BUCKETS), shown := progress.bar(what, BUCKETS)):
        for parts in records.groups(bucket, weights[bucket], limit):
            # The same words, the same draw.
            yield {held_out for _, held_out, _ in records.scan(bucket, parts)}
    shown.close()


def _bin(draw: bytes) -> int:
    return int.from_bytes(draw[:2], "big")
