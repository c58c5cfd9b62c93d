"""Files that may change while they are read, and are noticed to."""

import errno
import logging
import os
import stat
from typing import BinaryIO, NamedTuple

from lingua.errors import DataError

logger = logging.getLogger(__name__)

READ_BUFFER = 1 << 20  # bytes; after so many a file is looked at for changes
_END_BYTES = 512  # by which a file is known again


def shown(path: object) -> str:
    """A path as messages name it: on one line, whatever is in it."""
    return str(path) if str(path).isprintable() else repr(str(path))


def unreadable(path: str, position: int, error: OSError) -> DataError:
    return DataError(
        f"{shown(path)} cannot be read ({error.strerror or error}), at byte {position}: put it back"
        " and start the run again, or start a new run on the files that are there"
    )


def changed(path: str, position: int, what: str) -> DataError:
    return DataError(
        f"{shown(path)} {what} while this process reads it (up to byte {position}): restore it and"
        " start the run again, or start a new run"
    )


def _ends(file: BinaryIO, size: int) -> tuple[bytes, bytes]:
    """The first and the last bytes of the first `size` bytes of a file."""
    n = min(size, _END_BYTES)
    return os.pread(file.fileno(), n, 0), os.pread(file.fileno(), n, size - n)


class _Seen(NamedTuple):
    """What a file was like."""

    size: int
    mtime: int  # ns
    ends: tuple[bytes, bytes]


class WatchedFiles:
    """Opens the files of a share, pass after pass, and notices when one was changed.

    What may be harmless is reported and read: lines added, the same text written anew;
    between two runs also less, which may be somebody's mending of what is still to be
    read. A file that becomes shorter, or another one, while the process runs is refused.
    """

    def __init__(self):
        self.size = 0  # of the file that was looked at last
        self._seen: dict[str, _Seen] = {}
        self._reported: set[str] = set()

    def open_at(self, path: str, position: int, size_then: int | None = None) -> BinaryIO:
        """The file, at the line that begins at `position`. OSError, DataError.

        size_then: the size that a state of an earlier run has.
        """
        # Where a pipe has taken the place of the file, this does not wait for its other end.
        file = open(  # noqa: SIM115  (the caller closes it)
            path, "rb", READ_BUFFER, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)
        )
        try:
            self.check(file, path, position)
            file.seek(max(position - 1, 0))
            at_line_start = position == 0 or file.read(1) == b"\n" or position == self.size
            if position > self.size or not at_line_start:
                raise DataError(
                    f"{shown(path)} has no line that begins at byte {position}, where reading"
                    " stopped before: it was changed since; restore it, or start a new run"
                )
        except BaseException:
            file.close()
            raise
        if size_then not in (None, self.size):
            logger.warning(
                "%s has %d bytes, and had %d when the state to go on from was saved: going on at"
                " byte %d of what is there now", shown(path), self.size, size_then, position,
            )  # fmt: skip
        return file

    def check(self, file: BinaryIO, path: str, position: int) -> None:
        """Compare the open file with what it was like before. OSError, DataError."""
        now, before = os.fstat(file.fileno()), self._seen.get(path)
        if not stat.S_ISREG(now.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        self.size = now.st_size
        if before is not None:
            if (now.st_size, now.st_mtime_ns) == (before.size, before.mtime):
                return
            if now.st_size < before.size:
                what = f"was cut from {before.size} to {now.st_size} bytes"
                raise changed(path, position, what)
            if _ends(file, before.size) != before.ends:
                raise changed(path, position, "was replaced by another text")
            if path not in self._reported:
                logger.warning(
                    "%s was written while it is in use (%d bytes, before %d): what is there now is"
                    " read, and the run cannot be repeated", shown(path), now.st_size, before.size,
                )  # fmt: skip
            self._reported.add(path)
        self._seen[path] = _Seen(now.st_size, now.st_mtime_ns, _ends(file, now.st_size))
