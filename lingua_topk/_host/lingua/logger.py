"""Log lines with rank, level, time and time since the start."""

import contextlib
import logging
import sys
import time
from datetime import datetime, timedelta

from tqdm import tqdm

from lingua.distributed import get_global_rank, get_is_slurm_job


class LogFormatter(logging.Formatter):
    """`<rank>: INFO    26-01-31 12:00:00.000000 - 0:01:02 - message`.

    Under SLURM, where every task has a file of its own, the rank is left out.
    """

    def __init__(self):
        super().__init__()
        self.start_time = time.monotonic()
        self.rank = get_global_rank()
        self.show_rank = not get_is_slurm_job()

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%y-%m-%d %H:%M:%S.%f")
        # By a clock that nobody sets: records are shown as soon as they are made.
        elapsed = timedelta(seconds=round(time.monotonic() - self.start_time))
        rank = f"{self.rank}: " if self.show_rank else ""
        prefix = f"{rank}{record.levelname:<7} {when} - {elapsed} - "
        # The message, and a traceback or a stack where there is one.
        text = super().format(record)
        return prefix + text.replace("\n", "\n" + " " * len(prefix))


class _Console(logging.StreamHandler):
    """Writes each record in one piece, above whatever progress bar is on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record) + self.terminator, file=self.stream, end="")
            self.flush()
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A file that may not be written to any more, for want of room: that is said once."""

    _is_lost = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_lost:
            self._is_lost = True
            print(f"warning: {self.baseFilename} cannot be written: {error.strerror}",
                  file=sys.stderr)  # fmt: skip

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still to be written
            super().close()


class _Below(logging.Filter):
    def __init__(self, level: int):
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < self.level


def set_root_log_level(log_level: str) -> None:
    """Set the level by its name; "NOTSET" lets every record through."""
    logging.getLogger().setLevel(log_level.upper())


def init_logger(
    log_file: str | None = None, *, name: str | None = None, level: str = "INFO"
) -> None:
    """Send records to stdout, warnings and errors to stderr, and rank 0's to `log_file`.

    Replaces the handlers of the logger called `name` (default: the root).
    """
    target = logging.getLogger(name)
    target.setLevel(level)
    for handler in list(target.handlers):
        target.removeHandler(handler)
        if isinstance(handler, logging.FileHandler):
            handler.close()
    formatter = LogFormatter()
    out = _Console(sys.stdout)
    out.addFilter(_Below(logging.WARNING))
    err = _Console(sys.stderr)
    err.setLevel(logging.WARNING)
    handlers: list[logging.Handler] = [out, err]
    if log_file is not None and get_global_rank() == 0:
        handlers.append(_LogFile(log_file, mode="a", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        target.addHandler(handler)
