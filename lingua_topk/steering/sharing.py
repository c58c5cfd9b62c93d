"""What several contexts share that may overlap and end in any order."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock

_LOCK = Lock()
_ENTERED: dict[Hashable, "_Entered"] = {}


class _Entered:
    def __init__(self):
        self.users = 0
        self.undo = ExitStack()


@contextmanager
def shared(key: Hashable, begin: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """`begin()`, entered by the first who is inside with that key and left by the last."""
    with _LOCK:
        if key not in _ENTERED:
            entered = _Entered()
            entered.undo.enter_context(begin())
            _ENTERED[key] = entered
        entered = _ENTERED[key]
        entered.users += 1
    try:
        yield
    finally:
        with _LOCK:
            entered.users -= 1
            if not entered.users:
                del _ENTERED[key]
                entered.undo.close()
