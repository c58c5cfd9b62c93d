"""How a program ends by an error: one line for the user, and a status.

Both hosts use this module, and so do the other programs, under its name within lingua_topk: it and
what it imports need nothing else of the host.
"""

import errno
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from ._peers import lost_peer

# A disk without room, a quota, a limit on the size of files, a disk that may not be written to.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
MAKE_ROOM = "make room there, or give another place, then run it again"


def run(main: Callable[[], None]) -> None:
    """Call `main`; an error that is meant for the user becomes one line on stderr and its status.

    Such an exception carries `exit_status`, or is the system's about a file, or a lost process's.
    Of several processes on GPUs it leaves at once, whatever the error.
    """
    try:
        main()
    except Exception as error:
        lost = lost_peer(error)
        told = (1, lost) if lost is not None else _status_and_text(error)
        if told is None:
            if _may_wait_for_others():
                traceback.print_exc()
                _leave(1)
            raise
        # Whose error it was, and that it is gone, are two things to say.
        if _is_first_to_fail("errors" if lost is None else "lost"):
            print(f"error: {one_line(told[1])}", file=sys.stderr, flush=True)
        if _may_wait_for_others():
            _leave(told[0])
        raise SystemExit(told[0]) from None


def one_line(text: str) -> str:
    """Text from anywhere as a single printable line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _status_and_text(error: Exception) -> tuple[int, str] | None:
    """None for an error that nobody but we can mend."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        place = error.filename or "a file"
        return 2, f"{place} cannot be written: {error.strerror}: {MAKE_ROOM}"
    if isinstance(error, PermissionError):
        return 2, f"{error.filename or 'a file'}: {error.strerror}: give another path"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return 2, f"{error.filename} is no path ({error.strerror}): give a shorter one"
    status = getattr(error, "exit_status", None)
    return None if status is None else (status, str(error))


def _is_first_to_fail(kind: str) -> bool:
    """Whether no other process of this start and machine has reported an error of that kind.

    A mistake in a config is met by all processes, damage in one's share of the data by that
    one alone: asked is torchrun's own store. Without one every process speaks. Machines count
    their starts each for itself, so that a number of one says nothing about another's.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # not every program needs torch

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if kind == "lost" and not _is_of_this_machine(address):
        return True  # what cannot be reached may be that store, and torchrun waits for nobody
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"lingua_topk/{kind}/{socket.gethostname()}/{start}", 1) == 1
    except RuntimeError:  # torchrun itself is gone
        return True


def _is_of_this_machine(address: str) -> bool:
    """Whether an address is one of our own, which alone can be bound to."""
    try:
        family, *_, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(place)
        return True
    except OSError:
        return False


@contextmanager
def group_left_together() -> Iterator[None]:
    """At its end all processes leave their group; one that an error ends does not wait for that.

    With NCCL it would: for what is begun on its device, which the others have to do too, while they
    wait for this one, and what the error is would not be told.
    """
    import torch.distributed as dist

    is_of_all = False
    try:
        yield
        is_of_all = True
    except SystemExit:  # as all of them end that are told to
        is_of_all = True
        raise
    finally:
        if dist.is_initialized() and (is_of_all or dist.get_world_size() == 1):
            dist.destroy_process_group()


def _may_wait_for_others() -> bool:
    """Whether the interpreter's own end would be one more wait: of NCCL, for the others."""
    torch = sys.modules.get("torch")
    dist = getattr(torch, "distributed", None)
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size() > 1 and torch.cuda.is_available()


def _leave(status: int) -> None:
    """End at once, without the end of the process group; whoever started the others ends them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
