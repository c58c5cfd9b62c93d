"""The first pass: every document of the sources, into the records of the working folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apps.topk.corpus import progress
from apps.topk.corpus.draws import HELD_OUT, ORDER, content_hash, draw, seed_key
from apps.topk.corpus.records import Records
from apps.topk.corpus.sources import Source
from apps.topk.corpus.tally import Tally
from apps.topk.corpus.work import Pace, Work

# Of the memory that is allowed, what waits to be written; it is a little more while it is.
WAITING_SHARE = 1 / 8


def read(work: Work, sources: list[Source], inputs: dict[str, Any], memory: int) -> dict[str, Any]:
    """Read what is not read yet; the state at the end, which `work` keeps as "reading".

    The state holds `inputs`, the `size` of the records, how many `documents` they are, the
    tally, and the `origins` of the sources. `memory` is in bytes.
    """
    state = work.load("reading") or {
        "inputs": inputs,
        "source": 0,  # which is being read
        "cursor": None,  # after which document of it; None for the beginning
        "size": 0,
        "documents": 0,
        "tally": {"counts": {}, "examples": {}},
        "origins": [],
    }
    if state["source"] == len(sources):
        return state
    for one in sources[state["source"] :]:
        one.open()
    records = Records(work.documents, state["size"])
    try:
        _Reading(work, sources, state, records, int(memory * WAITING_SHARE)).run()
    finally:
        records.close()
    return state


class _Reading:
    """One run over what is left to read; `waiting` bytes of documents wait to be written.

    It is saved between two documents only. After an error or a signal nothing is: where a
    source then stands is not known for certain, and what was read since is read again.
    """

    def __init__(
        self, work: Work, sources: list[Source], state: dict, records: Records, waiting: int
    ):
        self.work, self.sources, self.state = work, sources, state
        self.records, self.waiting = records, waiting
        self.tally = Tally(**state["tally"])
        self.pace = Pace()

    def run(self) -> None:
        for number in range(self.state["source"], len(self.sources)):
            one = self.sources[number]
            self._read(one)
            self.state["source"] = number + 1
            self.state["origins"].append(one.origin())
            self._save(None)

    def _read(self, one: Source) -> None:
        key = seed_key(self.state["inputs"]["seed"])
        records = self.records
        for document in self._documents(one):
            words = content_hash(document)
            records.add(
                draw(words, key, ORDER), draw(words, key, HELD_OUT), document.encode("utf-8")
            )
            self.state["documents"] += 1
            if records.buffered >= self.waiting:
                records.flush()
                if self.pace.is_due():
                    self._save(one.cursor())
            elif self.pace.is_overdue():
                self._save(one.cursor())

    def _documents(self, one: Source) -> Iterator[str]:
        """The documents that are left of a source, under a bar."""
        with progress.bar(f"reading {Path(one.label).name}", one.size, one.unit) as shown:
            first = True
            for document in one.documents(self.tally, self.state["cursor"]):
                if first:  # the rate is that of this run, the share that of all
                    shown.total, shown.initial, shown.n = one.size or None, one.done, one.done
                    first = False
                _show(shown, one.done, self.state["documents"])
                yield document

    def _save(self, cursor: Any) -> None:
        with self.pace.saving():
            self.records.flush()
            self.records.sync()
            tally = {"counts": self.tally.counts, "examples": self.tally.examples}
            self.state.update(cursor=cursor, size=self.records.size, tally=tally)
            self.work.save("reading", self.state)


def _show(shown: tqdm, done: int, documents: int) -> None:
    if not shown.disable and documents % 100 == 0:
        shown.set_postfix_str(f"{documents:,} documents", refresh=False)
        shown.update(done - shown.n)
