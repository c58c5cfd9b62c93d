"""The second pass: the documents in their shuffled order, dealt to chunks or held out."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.topk.corpus import output, progress
from apps.topk.corpus.records import BUCKETS, Record, Records
from apps.topk.corpus.work import Pace, Work

# Of the memory that is allowed, what is read of the records at a time: the rest is for what
# the allocator cannot give back, and for the copy of a document that is being written.
GROUP_SHARE = 1 / 4

_ENCODER = json.JSONEncoder(ensure_ascii=False)


class Dealing:
    """Writes NAME/NAME.chunk.NN.jsonl and NAME/NAME.val.jsonl below `work.new`.

    `state` is what `work` keeps as "dealing": the `last` draw (hex) that is held out, which
    `bucket` comes next, how many documents were dealt and held out, and the sizes of the files
    then. What lies beyond those is cut off.
    """

    def __init__(self, work: Work, state: dict[str, Any], name: str, chunks: int, memory: int):
        self.work, self.state = work, state
        self.folder = work.new / name
        self.validation = self.folder / output.validation_name(name)
        self.paths = [self.folder / output.chunk_name(name, n, chunks) for n in range(chunks)]
        self.limit = int(memory * GROUP_SHARE)
        self.last = bytes.fromhex(state["last"])

    def training(self, records: Records, limit: int) -> Iterator[str]:
        """The training documents in their order, about `limit` bytes in memory at a time."""
        for _, group in records.ordered(limit):
            for record in group:
                if record.other > self.last:
                    yield record.text.decode("utf-8")

    def run(self, records: Records) -> None:
        """Deal what is not dealt yet, and write what is held out."""
        self.folder.mkdir(exist_ok=True)
        state, pace = self.state, Pace()
        if state["bucket"] < BUCKETS:
            self._cut()
        held_out = Records(self.work.held_out, state["held_out_size"])
        try:
            total = state["distinct"]
            with progress.bar("writing", total) as shown:
                shown.update(state["train"]["documents"] + state["validation"]["documents"])
                dealt = state["bucket"]
                for bucket, group in records.ordered(self.limit, dealt):
                    if bucket > dealt and pace.is_due():  # all of the ones before is dealt
                        with pace.saving():
                            self._save(bucket, held_out)
                    dealt = bucket
                    self._deal(group, held_out)
                    shown.update(len(group))
            self._save(BUCKETS, held_out)
            self._write_held_out(held_out)
        finally:
            held_out.close()

    def _deal(self, group: list[Record], held_out: Records) -> None:
        train = []
        for record in group:
            if record.other > self.last:
                train.append(record.text)
            else:  # read back later, in the order of the other draw
                held_out.add(record.other, record.key, record.text)
                if held_out.buffered >= self.limit // 2:
                    held_out.flush()
                _count(self.state["validation"], record.text)
        # Dealt like cards, so that the chunks differ by one document at most.
        chunks, dealt = len(self.paths), self.state["train"]["documents"]
        for first in range(min(chunks, len(train))):
            with open(self.paths[(dealt + first) % chunks], "ab") as file:
                for text in train[first::chunks]:
                    file.write(_line(text))
        for text in train:
            _count(self.state["train"], text)

    def _save(self, bucket: int, held_out: Records) -> None:
        held_out.flush()
        held_out.sync()
        for path in self.paths:
            if path.exists():
                output.sync_path(path)
        sizes = [path.stat().st_size if path.exists() else 0 for path in self.paths]
        self.state.update(bucket=bucket, held_out_size=held_out.size, sizes=sizes)
        self.work.save("dealing", self.state)

    def _cut(self) -> None:
        """Bring the chunks back to the sizes that were saved."""
        for path, size in zip(self.paths, self.state["sizes"], strict=True):
            if size or path.exists():
                os.truncate(path, size)

    def _write_held_out(self, held_out: Records) -> None:
        with open(self.validation, "wb") as file:
            for _, group in held_out.ordered(self.limit):
                file.writelines(_line(record.text) for record in group)
            file.flush()
            os.fsync(file.fileno())


def new_state(inputs: dict[str, Any], distinct: int, last: bytes) -> dict[str, Any]:
    """The state before anything is dealt."""
    return {
        "inputs": inputs,
        "distinct": distinct,
        "last": last.hex(),
        "bucket": 0,
        "held_out_size": 0,
        "sizes": [0] * inputs["chunks"],
        "train": {"documents": 0, "characters": 0, "bytes": 0},
        "validation": {"documents": 0, "characters": 0, "bytes": 0},
    }


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a file that was written here."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)["text"]


def _line(text: bytes) -> bytes:
    return (_ENCODER.encode({"text": text.decode("utf-8")}) + "\n").encode("utf-8")


def _count(counts: dict[str, int], text: bytes) -> None:
    counts["documents"] += 1
    counts["characters"] += len(text.decode("utf-8"))
    counts["bytes"] += len(text)
