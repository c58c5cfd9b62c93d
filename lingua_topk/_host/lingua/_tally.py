"""How many lines were read and skipped, and whether that is too many."""

import logging
from collections import Counter

from lingua._watched import shown
from lingua.errors import DataError

logger = logging.getLogger(__name__)

# A file is refused once more than this share of the lines read are malformed, unless the
# config says otherwise; fewer lines than MIN_LINES_TO_JUDGE are judged as if so many had
# been read.
MAX_MALFORMED_SHARE = 0.1
MIN_LINES_TO_JUDGE = 100
# Skipped lines of a source that are reported one by one; the others are only counted.
N_REPORTED_LINES = 5


def _counted(kinds: Counter) -> str:
    """What was skipped, by kind, the most frequent first."""
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


class Tally:
    """Counts the lines of a share, judges its files, and reports without a flood."""

    def __init__(self, max_malformed: float):
        self._max_malformed = max_malformed
        self._n_reported = 0
        self._files_done: set[str] = set()
        self.first = ""  # the first skipped line and the reason
        self._start_pass()

    def _start_pass(self) -> None:
        self._pass_read, self._pass_skipped = 0, Counter()

    def start_file(
        self, path: str, position: int, numbered: bool, n_judged: int, n_malformed: int
    ) -> None:
        """Reading begins at `position`, after `n_judged` lines of which some were malformed.

        numbered: whether line numbers are known, or only byte positions.
        """
        self._path, self._start, self._numbered = path, position, numbered
        self._n_judged, self.n_malformed = n_judged, n_malformed
        self._n_read, self._skipped = 0, Counter()

    def count_line(self) -> None:
        self._n_read += 1
        self._n_judged += 1

    def skip(self, index: int, position: int, reason: str, malformed: bool) -> None:
        """The line of that index, which ends at `position`, is of no use."""
        place = f"line {index + 1}" if self._numbered else f"line before byte {position}"
        self._skipped[reason.partition(":")[0]] += 1
        self.first = self.first or f"{shown(self._path)} {place}: {reason}"
        if self._path not in self._files_done and self._n_reported < N_REPORTED_LINES:
            self._n_reported += 1
            logger.warning("skipped %s %s: %s", shown(self._path), place, reason)
        if malformed:
            self.n_malformed += 1
            self._judge()

    def _judge(self) -> None:
        if self.n_malformed / max(self._n_judged, MIN_LINES_TO_JUDGE) > self._max_malformed:
            raise DataError(
                f"{shown(self._path)}: {self.n_malformed} of the first {self._n_judged} lines read"
                f" are malformed, more than data.max_malformed={self._max_malformed:g} allows"
                f' (first of all: {self.first}): write one JSON object with a "text" a line, or'
                " allow a larger share, up to 1"
            )

    def finish_file(self) -> None:
        self._pass_read += self._n_read
        self._pass_skipped.update(self._skipped)
        if self._skipped and self._path not in self._files_done:
            logger.warning(
                "%s: skipped %d of the %d lines read%s (%s)", shown(self._path),
                self._skipped.total(), self._n_read,
                f" from byte {self._start} on" if self._start else "", _counted(self._skipped),
            )  # fmt: skip
        if self._start == 0:
            self._files_done.add(self._path)

    def finish_pass(self, name: str, number: int, is_whole: bool) -> None:
        """Say what pass `number`, from 1 on, over the files called `name` has read."""
        # A small file is read many times a second: passes 1, 2, 4, 8 ... are enough.
        if number & (number - 1) == 0:
            logger.info(
                "%s: %spass %d has read %d lines and skipped %d%s", name,
                "" if is_whole else "the rest of ", number, self._pass_read,
                self._pass_skipped.total(),
                f" ({_counted(self._pass_skipped)})" if self._pass_skipped else "",
            )  # fmt: skip
        self._start_pass()
