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
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError

NAME = ".lock"
# What flock says of a lock that another process has; all else is a file system without locks.
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)

_held: set[int] = set()  # descriptors


@contextmanager
def held(folder: Path, field: str) -> Iterator[str | None]:
    """Within it no other program that asks for `folder` gets it; it is made where there is none.

    field: the name under which the user gave it. Yields a line for the log where it cannot be
    locked, None where it is. ConfigError while another program has it; nothing is changed then.
    """
    is_new = not folder.exists()
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(path)
    except BlockingIOError:
        raise ConfigError(
            f"{field}={folder} is being written by another program ({_holder(path)}): wait for its"
            " end or stop it, or give another folder"
        ) from None
    except OSError as error:
        # Whoever cannot write there at all finds that out by what it writes, and says it better.
        yield (
            f"{folder} cannot be locked ({error.strerror}): that no other program writes there at"
            " the same time is not checked"
        )
        return
    _held.add(descriptor)
    try:
        yield None
    finally:
        with suppress(OSError):
            path.unlink()  # ours still, so that nobody has it: see _taken
        _held.discard(descriptor)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _taken(path: Path) -> int:
    """A descriptor with the lock. BlockingIOError where another has it, OSError for no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(descriptor, path):  # else the one before has ended and removed it
                _describe(descriptor)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in TAKEN:
                raise BlockingIOError from None
            raise
        os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _describe(descriptor: int) -> None:
    """Write down who has it, for those that it refuses."""
    words = {"process": os.getpid(), "machine": socket.gethostname()}
    job = os.environ.get("SLURM_JOB_ID")
    with suppress(OSError):  # a full disk, on which it is locked all the same
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({**words, **({"job": job} if job else {})}).encode(), 0)


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
