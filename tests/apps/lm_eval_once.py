"""What lm-eval finds out again and again in one process, found out once.

The 14,000 files of tasks that it brings, which it reads anew for every folder of ours, and what it
notes of this machine (pip's list, among others) after every task.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def read_once() -> Iterator[None]:
    """Within it."""
    from lm_eval.tasks import _index, manager
    from torch.utils import collect_env

    own, build = Path(manager.__file__).parent, _index.TaskIndex.build
    own_tasks = functools.cache(lambda: build([own]))

    def build_once(paths):
        others = [path for path in paths if path != own]
        found = build(others)
        return {**own_tasks(), **found} if len(others) < len(paths) else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index.TaskIndex, "build", staticmethod(build_once))
        once = functools.cache(collect_env.get_pretty_env_info)
        patch.setattr(collect_env, "get_pretty_env_info", once)
        yield
