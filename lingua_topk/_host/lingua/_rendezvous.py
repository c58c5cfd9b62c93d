"""Where the processes of one start of a run find each other under torchrun.

torchrun keeps one store for all starts of `--max-restarts`, and torch writes the addresses of the
processes under the same names each time (pytorch issue 135712): who is early reads that of a
process which is dead. The number of the start, which torchrun tells, is one a node, and not the
same on all. So the processes agree on a name here, and use the store below it.
"""

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

_PREFIX = "lingua/start"
_PAUSE = 0.02  # seconds


def is_torchruns() -> bool:
    """Whether torchrun itself holds the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_of_this_start(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """torchrun's store, below a name that the processes of this start alone know."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    name = _lead(store, size, timeout) if rank == 0 else _follow(store, rank)
    return dist.PrefixStore(f"{_PREFIX}/{name}", store)


def _follow(store: dist.Store, rank: int) -> str:
    """The name that rank 0 gives to whoever calls itself by this new number."""
    call = uuid4().hex
    store.set(f"{_PREFIX}/call/{rank}", call)
    name = store.get(f"{_PREFIX}/answer/{call}").decode()
    store.add(f"{_PREFIX}/{name}/heard", 1)
    return name


def _lead(store: dist.Store, size: int, timeout: timedelta) -> str:
    """Answer every call, those of dead processes too, until all others have heard.

    A process of an earlier start is dead before one of this start begins: torchrun sees to it.
    """
    name, answered = uuid4().hex, set()
    until = time.monotonic() + timeout.total_seconds()
    while (heard := store.add(f"{_PREFIX}/{name}/heard", 0)) < size - 1:
        for rank in range(1, size):
            key = f"{_PREFIX}/call/{rank}"
            call = store.get(key) if store.check([key]) else None
            if call is not None and call not in answered:
                store.set(f"{_PREFIX}/answer/{call.decode()}", name)
                answered.add(call)
        if time.monotonic() > until:
            raise dist.DistStoreError(f"timed out with {heard + 1} of {size} processes there")
        time.sleep(_PAUSE)
    return name
