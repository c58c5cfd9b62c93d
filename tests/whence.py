"""Where the modules of a host came from, in a process and in the workers that it starts.

`main`, for programs that the tests run, prints a report for each process, as JSON; `assert_only`
judges them. Nothing of ours or of a host is imported here at the top: a worker loads what it is
asked to do, and no more.
"""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from types import ModuleType

# Modules that one host alone has: the embedded one, Meta Lingua, and what the tests call `stray`.
ONES_OWN = {
    "embedded": ("lingua._jsonl", "apps.main._checks"),
    "lingua": ("lingua.probe", "apps.main.generate"),
    "stray": ("lingua.stray", "apps.main.stray"),
}


def report() -> dict:
    """What this process has loaded, and which host it has bound."""
    host = sys.modules.get("lingua_topk.host")
    bound = host and host.bound()
    return {
        "process": os.getpid(),
        "bound": str(bound and bound.root),
        "host": places("lingua", "apps.main"),
        "ours": places("apps.topk", "lingua_topk.host"),
        "in reach": [kind for kind, names in ONES_OWN.items() if any(map(can_import, names))],
    }


def places(*packages: str) -> dict[str, list[str]]:
    """Files and folders of the loaded modules of `packages`."""
    prefixes = tuple(f"{name}." for name in packages)
    loaded = {name: m for name, m in sys.modules.items() if f"{name}.".startswith(prefixes)}
    return {
        name: [os.path.realpath(place) for place in (file_of(m), *getattr(m, "__path__", ()))]
        for name, m in loaded.items()
    }


def file_of(module: ModuleType) -> str:
    """Its file; for a folder without an __init__.py, which has none, that of no module."""
    return getattr(module, "__file__", None) or os.devnull


def can_import(name: str) -> bool:
    """Whether a further import would find it; nothing is imported to know that."""
    return name.rpartition(".")[0] in sys.modules and find_spec(name) is not None


def with_the_trainer() -> dict:
    import_module("apps.topk.train")
    return report()


@contextmanager
def endless_reports():
    yield repeat(report())


def from_loader(method: str) -> dict:
    """From the process that loads data asynchronously, which begins with a function of the host."""
    multiprocessing.set_start_method(method, force=True)
    with import_module("lingua.data").async_iterator(1, endless_reports) as items:
        return next(iter(items))


def from_pool(method: str) -> dict[str, dict]:
    """From a worker that begins with a function of ours, and from a data loader's below it."""
    ours = import_module("apps.topk.lingua_host").is_lingua
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        pool.submit(ours).result()
        own, below = pool.submit(with_the_trainer), pool.submit(from_loader, method)
        return {f"{method} pool": own.result(), f"{method} below": below.result()}


def main(*workers: str) -> None:
    """Report from this process and from `workers`, for instance "spawn loader"."""
    found = {"first": with_the_trainer()}
    for method, kind in map(str.split, workers):
        if kind == "loader":
            found[f"{method} loader"] = from_loader(method)
        else:
            found |= from_pool(method)
    print(json.dumps(found))


def assert_only(root: Path, ours: Path, reports: dict[str, dict]) -> None:
    """Every process has bound the host in `root`, has loaded it, and has nothing of any other."""
    kind = "embedded" if root.name == "_host" else "lingua"
    for process, seen in reports.items():
        assert not (wrong := outside(root, seen["host"])), f"{process} is not of {root}: {wrong}"
        assert not (wrong := outside(ours, seen["ours"])), f"{process} is not of {ours}: {wrong}"
        assert seen["bound"] == str(root), f"{process} has bound {seen['bound']}"
        # Nor would a module that this host lacks come from another one.
        assert seen["in reach"] == [kind], f"{process} can import from {seen['in reach']}"
        assert needed(process) <= seen["host"].keys(), f"{process} has loaded {seen['host'].keys()}"
    assert len({seen["process"] for seen in reports.values()}) == len(reports)


def needed(process: str) -> set[str]:
    """What a process loads in any case: a data loader's only what loads data."""
    loads_data = process.endswith(("loader", "below"))
    return {"lingua", "lingua.data"} | (set() if loads_data else {"apps.main.train"})


def outside(folder: Path, loaded: dict[str, list[str]]) -> dict[str, list[str]]:
    """The modules that are not, or not only, in `folder`."""
    return {
        name: found
        for name, found in loaded.items()
        if not all(Path(place).is_relative_to(folder) for place in found)
    }
