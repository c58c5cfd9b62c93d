"""A folder that one program at a time writes.

The lock is on an open file (flock), which the system gives back when the process ends, however
it ends: what a killed run leaves behind refuses nobody. Between the nodes of a cluster it is as
good as their file system: NFS passes it on to its server, which keeps that of a node that lost
its power until the lease is over (a minute or two); Lustre has to be mounted with `flock`. Where
there are no locks, that is said, and the folder is used as it is.

Both hosts use this module, and so do the other programs, under its name within lingua_topk: it and
what it imports need nothing else of the host.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError

logger = logging.getLogger(__name__)

NAME = ".lingua_topk.lock"
# What flock says of a lock that another process has; all else is a file system without locks.
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
# How long a job that SLURM or torchrun started again waits for its own earlier start; between
# two looks.
PATIENCE, PAUSE = 180.0, 5.0  # seconds
_BEGINNING = b'{"process": '  # of what is written into the file
_TRIES = 10  # for a folder that others make and remove

_held: set[int] = set()  # descriptors


@contextmanager
def held(folder: Path, field: str, given: Path | None = None) -> Iterator[str | None]:
    """Within it no other program that asks for `folder` gets it; it is made where there is none.

    field: the name under which the user gave it, or `given`, to which it belongs. Yields a line for
    the log where it can be written but not locked, None where it is locked, and where it cannot be
    written at all: whoever tries finds that out, and says it better. ConfigError while another
    program has it; nothing is changed then.
    """
    is_new = not os.path.exists(folder)
    path = folder / NAME
    descriptor = note = None
    try:
        descriptor = _taken_in_time(path)
    except BlockingIOError:
        raise ConfigError(
            f"{field}={given or folder} is being written by another program ({_holder(path)}): wait"
            " for its end or stop it, or give another folder"
        ) from None
    except OSError as error:
        note = _note(path, error)
    # Not within the `except`: an error of the body did not come of this one.
    try:
        yield note
    finally:
        if descriptor in _held:  # not in a forked process
            with suppress(OSError):
                path.unlink()  # ours still, so that nobody has it: see _taken
            _held.discard(descriptor)
            os.close(descriptor)
        if is_new:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def folders_of_run(dump_dir: str, checkpoints: str | None) -> Iterator[tuple[str, Path]]:
    """Field and path of each folder that a training run has to have for itself.

    The checkpoints' own also within dump_dir: another run may have it as its checkpoint.path.
    """
    yield "dump_dir", Path(dump_dir)
    if checkpoints and Path(checkpoints).resolve() != Path(dump_dir).resolve():
        yield "checkpoint.path", Path(checkpoints)


def _note(path: Path, error: OSError) -> str | None:
    """What to say of a folder that is not locked; None where nothing can be made in it."""
    if not os.path.lexists(path) or not os.access(path.parent, os.W_OK):
        return None
    return (
        f"{path.parent} cannot be locked ({error.strerror}): that no other program writes there at"
        " the same time is not checked"
    )


def _taken_in_time(path: Path) -> int:
    """_taken, waiting for what an earlier start of this job has left.

    A file system of a cluster may keep the lock of a node that failed until its lease is over.
    """
    until = time.monotonic() + PATIENCE
    is_told = False
    while True:
        try:
            return _taken(path)
        except BlockingIOError:
            if not _is_of_earlier_start(path) or time.monotonic() >= until:
                raise
        if not is_told:
            logger.warning(
                "%s is locked by an earlier start of this job: waiting for at most %.0f s",
                path.parent, PATIENCE,
            )  # fmt: skip
            is_told = True
        time.sleep(PAUSE)


def _is_of_earlier_start(path: Path) -> bool:
    """Whether it was written by a start before this one, of the same SLURM job or torchrun."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return any(found.get(kind) == name for kind, name in _started_again().items())
    except (OSError, ValueError, AttributeError):
        return False


def _launched_by() -> dict[str, str]:
    """What started this program, by kind, and what it calls this job."""
    names = {"job": "SLURM_JOB_ID", "torchrun": "TORCHELASTIC_RUN_ID"}
    found = {kind: os.environ.get(name) for kind, name in names.items()}
    # "none" is what torchrun is called where nobody gave it a name: anybody's.
    return {kind: name for kind, name in found.items() if name and name != "none"}


def _started_again() -> dict[str, str]:
    """Of what started this program, that which has done so before."""
    counts = {"job": "SLURM_RESTART_COUNT", "torchrun": "TORCHELASTIC_RESTART_COUNT"}
    times = {kind: os.environ.get(name, "") for kind, name in counts.items()}
    return {
        kind: name
        for kind, name in _launched_by().items()
        if times[kind].isdecimal() and int(times[kind]) > 0
    }


def _taken(path: Path) -> int:
    """A descriptor with the lock. BlockingIOError where another has it, OSError for no locks."""
    while True:
        descriptor = _opened(path)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _not_ours(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(descriptor, path):  # else the one before has ended and removed it
                _describe(descriptor, path)
                _held.add(descriptor)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in TAKEN:
                raise BlockingIOError from None
            raise
        os.close(descriptor)


def _opened(path: Path) -> int:
    """The file itself, never what a link leads to, and without waiting for a pipe's other end."""
    for tries_left in reversed(range(_TRIES)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            return os.open(path, flags, 0o666)
        except FileNotFoundError:  # the one before has just removed the folder that it made
            if not tries_left:
                raise
        except OSError as error:
            raise _not_ours(path) if error.errno == errno.ELOOP else error from None
    raise AssertionError


def _not_ours(path: Path) -> OSError:
    return OSError(errno.EINVAL, f"{path.name} in it is not of this program")


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _describe(descriptor: int, path: Path) -> None:
    """Write down who has it, for those that it refuses. OSError for a file of somebody else."""
    # Empty, or zeros after a power failure, where its writer did not come further.
    found = os.pread(descriptor, len(_BEGINNING), 0).strip(b"\0")
    if not _BEGINNING.startswith(found):
        raise _not_ours(path)
    words = {"process": os.getpid(), "machine": socket.gethostname(), **_launched_by()}
    with suppress(OSError):  # a full disk, on which it is locked all the same
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(words).encode(), 0)


def _holder(path: Path) -> str:
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        job = f" of SLURM job {words['job']}" if "job" in words else ""
        return f"process {words['process']} on {words['machine']}{job}"
    except (OSError, ValueError, LookupError, TypeError):
        return "which has not said who it is"


def _forget_in_child() -> None:
    """A forked process does not hold what its parent holds, and would keep it beyond its end."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
