"""Documents on disk under 16-byte keys, read back in the order of the keys.

Keys are drawn evenly, so their leading bits deal the records into buckets of about equal
size. Records are gathered in memory and written a segment at a time, the segment's records
bucket by bucket; a bucket is read from all segments. One that is too large for memory is
read in several goes, divided by the next bits of the key.

    segment   offsets u64[BUCKETS + 1] (bytes, from the segment's start, where each bucket's
              records begin, and the end), counts u64[BUCKETS] (records), records
    record    key [16], other [16] (a second draw), length of the text u64, text in UTF-8

The file ends with whole segments when it is cut to a `size` that `flush` left.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apps.topk.corpus.draws import BYTES
from lingua_topk.errors import DataError

BUCKET_BITS = 10
PART_BITS = 8  # the bits after those divide a bucket that is too large
BUCKETS = 1 << BUCKET_BITS
PARTS = 1 << PART_BITS
# Bytes that a record takes in memory beside its text: objects, and its place in a dict.
OVERHEAD = 320

_RECORD = struct.Struct(f"<{BYTES}s{BYTES}sQ")
_OFFSETS = 8 * (BUCKETS + 1)
_HEADER = _OFFSETS + 8 * BUCKETS


class Record(NamedTuple):
    """One document: its key, its second draw and its text in UTF-8."""

    key: bytes
    other: bytes
    text: bytes


class Records:
    """The file at `path`, cut to `size` bytes; made where it is not there.

    `buffered` bytes are in memory until `flush`. DataError when the file is shorter.
    """

    def __init__(self, path: Path, size: int = 0):
        self.path, self.size = path, size
        self.buffered = 0
        self._buffers = [bytearray() for _ in range(BUCKETS)]
        self._counts = np.zeros(BUCKETS, dtype="<u8")
        self._file = open(path, "rb+" if path.exists() else "wb+")  # noqa: SIM115
        if os.fstat(self._file.fileno()).st_size < size:
            self._file.close()
            raise DataError(
                f"{path} is shorter than what was written to it: remove {path.parent} to start"
                " afresh"
            )
        self._file.truncate(size)
        self._segments = list(self._walk())

    def close(self) -> None:
        self._file.close()

    def add(self, key: bytes, other: bytes, text: bytes) -> None:
        """Add a record; it is in memory until `flush`."""
        bucket = _prefix(key) >> PART_BITS
        buffer = self._buffers[bucket]
        buffer += _RECORD.pack(key, other, len(text))
        buffer += text
        self._counts[bucket] += 1
        self.buffered += _RECORD.size + len(text)

    def flush(self) -> None:
        """Write what is in memory as a segment, which makes `size` larger."""
        if not self.buffered:
            return
        sizes = [len(buffer) for buffer in self._buffers]
        offsets = np.cumsum([_HEADER, *sizes]).astype("<u8")
        self._file.seek(self.size)
        self._file.write(offsets.tobytes() + self._counts.tobytes())
        for bucket, buffer in enumerate(self._buffers):
            self._file.write(buffer)
            self._buffers[bucket] = bytearray()
        self._file.flush()
        self._segments.append(self.size)
        self.size += int(offsets[-1])
        self.buffered = 0
        self._counts[:] = 0

    def sync(self) -> None:
        """Return when what was flushed is on the disk."""
        os.fsync(self._file.fileno())

    def weights(self) -> list[int]:
        """The bytes of memory that each bucket takes, duplicates counted."""
        total = np.zeros(BUCKETS, dtype="<u8")
        for start in self._segments:
            header = self._read(start, _HEADER)
            offsets = np.frombuffer(header, dtype="<u8", count=BUCKETS + 1)
            counts = np.frombuffer(header, dtype="<u8", offset=_OFFSETS)
            total += np.diff(offsets) + counts * OVERHEAD
        return total.tolist()

    def scan(self, bucket: int, parts: range = range(PARTS)) -> Iterator[tuple]:
        """(key, other, text) of every record of `parts` of a bucket, in the order of writing.

        The text is a memoryview that holds until the next record is asked for.
        """
        everything = len(parts) == PARTS
        for start in self._segments:
            begin, end = struct.unpack("<QQ", self._read(start + 8 * bucket, 16))
            run = memoryview(self._read(start + begin, end - begin))
            position = 0
            while position < len(run):
                key, other, length = _RECORD.unpack_from(run, position)
                position += _RECORD.size
                if everything or _prefix(key) % PARTS in parts:
                    yield key, other, run[position : position + length]
                position += length

    def groups(self, bucket: int, weight: int, limit: int) -> list[range]:
        """The parts of a bucket of `weight` bytes in groups of at most `limit` bytes each.

        A single part can be more: one long document, or duplicates of one.
        """
        if weight <= limit:
            return [range(PARTS)] if weight else []
        weights = [0] * PARTS
        for key, _, text in self.scan(bucket):
            weights[_prefix(key) % PARTS] += _RECORD.size + len(text) + OVERHEAD
        groups, first, total = [], 0, 0
        for part, part_weight in enumerate(weights):
            if total and total + part_weight > limit:
                groups.append(range(first, part))
                first, total = part, 0
            total += part_weight
        return [*groups, range(first, PARTS)]

    def distinct(self, bucket: int, parts: range) -> list[Record]:
        """The records of `parts` of a bucket by their keys; of a key, the least text."""
        kept: dict[bytes, tuple[bytes, bytes]] = {}
        for key, other, text in self.scan(bucket, parts):
            there = kept.get(key)
            # UTF-8 sorts as the characters do.
            if there is None or text.tobytes() < there[1]:
                kept[key] = (other, text.tobytes())
        return [Record(key, *kept[key]) for key in sorted(kept)]

    def ordered(self, limit: int, first: int = 0) -> Iterator[tuple[int, list[Record]]]:
        """Every distinct record from bucket `first` on in the order of the keys, a list at a
        time that takes about `limit` bytes; with the bucket that it comes from.

        The list is emptied when the next one is asked for.
        """
        weights = self.weights()
        for bucket in range(first, BUCKETS):
            for parts in self.groups(bucket, weights[bucket], limit):
                records = self.distinct(bucket, parts)
                yield bucket, records
                records.clear()

    def _walk(self) -> Iterator[int]:
        """Where the segments start."""
        start = 0
        while start < self.size:
            yield start
            (length,) = struct.unpack("<Q", self._read(start + 8 * BUCKETS, 8))
            start += max(length, _HEADER)

    def _read(self, position: int, length: int) -> bytes:
        content = os.pread(self._file.fileno(), length, position)
        while len(content) < length:  # a read returns 2 GiB at most
            more = os.pread(self._file.fileno(), length - len(content), position + len(content))
            if not more:
                raise DataError(
                    f"{self.path} ends before what was written to it: remove {self.path.parent} to"
                    " start afresh"
                )
            content += more
        return content


def _prefix(key: bytes) -> int:
    """The leading BUCKET_BITS + PART_BITS of a key."""
    return int.from_bytes(key[:3], "big") >> (24 - BUCKET_BITS - PART_BITS)
