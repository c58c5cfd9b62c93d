"""Which host runs underneath, Meta Lingua or the embedded one, and how it is bound.

Standard library only. A host is a root folder that holds both
`lingua/transformer.py` and `apps/main/train.py`. Binding puts that root's `lingua`
into `sys.modules` by its path, so that neither another root on `sys.path` nor an
unrelated package called `lingua` can take its place, and puts only that root's `apps`
folder in front of `apps.__path__`.
"""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass
from pathlib import Path

from lingua_topk.errors import HostError

HOST_VARIABLE = "LINGUA_TOPK_HOST"
HOME_VARIABLE = "LINGUA_HOME"
CHOICES = ("auto", "lingua", "embedded")
MARKS = ("lingua/transformer.py", "apps/main/train.py")
EMBEDDED_ROOT = Path(__file__).resolve().parent / "_host"


@dataclass(frozen=True)
class Host:
    """A chosen host: `kind` is "lingua" or "embedded", `root` the folder it lives in."""

    kind: str
    root: Path
    commit: str | None = None

    def describe(self) -> str:
        """One phrase for logs and for the files written beside results."""
        if self.kind == "embedded":
            return "embedded host"
        return f"Meta Lingua at {self.root}, commit {self.commit or 'unknown'}"


_bound: Host | None = None


def bound() -> Host | None:
    """The host this process has bound, or None."""
    return _bound


def choose(environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Host:
    """Pick the host from LINGUA_TOPK_HOST, LINGUA_HOME and the working directory.

    Raises HostError, saying what was looked for and where, when a host is forced
    that is not there.
    """
    environ = os.environ if environ is None else environ
    cwd = Path.cwd() if cwd is None else cwd
    base = submitted_from(environ, cwd) or cwd
    wanted = environ.get(HOST_VARIABLE) or "auto"
    if wanted not in CHOICES:
        raise HostError(
            f"{HOST_VARIABLE}={wanted!r} is not a host: allowed are {', '.join(CHOICES)}"
        )
    if wanted == "embedded":
        return Host("embedded", EMBEDDED_ROOT)
    root = _find_checkout(environ, cwd, base)
    if root is not None:
        return Host("lingua", root, _commit(root))
    if wanted == "lingua":
        raise HostError(
            f"{HOST_VARIABLE}=lingua, but {HOME_VARIABLE} is not set and {cwd} is no checkout of"
            f" facebookresearch/lingua (looked for {' and '.join(MARKS)}):"
            f" set {HOME_VARIABLE} to a checkout, or {HOST_VARIABLE}=embedded"
        )
    return Host("embedded", EMBEDDED_ROOT)


def _find_checkout(environ: Mapping[str, str], cwd: Path, base: Path) -> Path | None:
    """LINGUA_HOME, relative to `base`, or else `cwd` if that is a checkout.

    In a job of stool, which begins in a copy of what it was submitted from, the copy of a
    checkout comes first: it is what was to run.
    """
    home = environ.get(HOME_VARIABLE)
    is_copy = base != cwd and not _missing(cwd.resolve())
    if home and not is_copy:
        root = (base / Path(home).expanduser()).resolve()
        if root == EMBEDDED_ROOT:
            raise HostError(
                f"{HOME_VARIABLE}={home!r} is the embedded host, not a checkout of"
                " facebookresearch/lingua: correct it, or unset it and set"
                f" {HOST_VARIABLE}=embedded"
            )
        missing = _missing(root)
        if missing:
            raise HostError(
                f"{HOME_VARIABLE}={home!r} is not a checkout of facebookresearch/lingua:"
                f" {', '.join(missing)} not found in {root}; correct it, or unset it to use the"
                " embedded host"
            )
        return root
    root = cwd.resolve()
    return None if root == EMBEDDED_ROOT or _missing(root) else root


def submitted_from(environ: Mapping[str, str], cwd: Path) -> Path | None:
    """The folder that a job of stool was submitted from, if `cwd` is the copy it made.

    The script that stool writes exports LAUNCH_WITH and DUMP_DIR and then changes into
    DUMP_DIR/code, or into code.N, to the newest of which code is a link; bash keeps the folder
    before in OLDPWD.
    """
    before, dump_dir = environ.get("OLDPWD"), environ.get("DUMP_DIR")
    if environ.get("LAUNCH_WITH") != "SBATCH" or not before or not dump_dir:
        return None
    code = Path(before, dump_dir, "code")
    copies = [code, *code.parent.glob("code.*")]
    return Path(before) if cwd.resolve() in [copy.resolve() for copy in copies] else None


def leave_copied_code() -> None:
    """In a job of stool, go back to where it was submitted: paths mean what they meant there.

    The code is imported from the copy all the same, which the interpreter has put on its path
    when it started.
    """
    before = submitted_from(os.environ, Path.cwd())
    if before is not None:
        os.chdir(before)


def _missing(root: Path) -> list[str]:
    return [mark for mark in MARKS if not (root / mark).is_file()]


def _commit(root: Path) -> str | None:
    """The commit of the repository whose top folder is `root`, None if it is not one."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    top, commit = answer.stdout.splitlines()
    return commit if Path(top).resolve() == root else None


def bind(apps_path: MutableSequence[str], host: Host | None = None) -> Host:
    """Make `lingua` and `apps.main` mean those of `host` (default: `choose()`).

    `apps_path` is the `__path__` of the `apps` package. Binding the same host again
    does nothing; another one raises HostError, since a process that mixed two hosts
    would fail in ways that nobody could read.
    """
    global _bound
    host = host or choose()
    if _bound is not None and _bound.root != host.root:
        raise HostError(
            f"this process already runs on the {_bound.describe()}; {host.describe()} needs a new"
            " process"
        )
    _bind_lingua(host)
    _bind_apps_main(host, apps_path)
    _bound = host
    _name_to_workers(host)
    return host


def _name_to_workers(host: Host) -> None:
    """Processes that this one starts from here on bind `host`, and before anything else of it.

    Where their main module imports `apps`, by the environment: they may look from another
    folder. Where it does not (a notebook, a script that imports when it is run), by what every
    process object takes along: it is unpickled before the target, which may be lingua's.
    """
    _name_in_environment(host)
    multiprocessing.current_process()._config["lingua_topk.host"] = _Binding(host)


def _name_in_environment(host: Host) -> None:
    os.environ[HOST_VARIABLE] = host.kind
    if host.kind == "lingua":
        os.environ[HOME_VARIABLE] = str(host.root)


@dataclass(frozen=True)
class _Binding:
    """Binds `host` in the process in which it is unpickled."""

    host: Host

    def __reduce__(self):
        return _bind_in_worker, (self.host,)


def _bind_in_worker(host: Host) -> _Binding:
    _name_in_environment(host)  # the environment of a fork server may be older than the choice
    bind(importlib.import_module("apps").__path__, host)
    return _Binding(host)


def _bind_apps_main(host: Host, apps_path: MutableSequence[str]) -> None:
    """Put the host's `apps` folder before any other that has a `main`, and after those without.

    A checkout with our folder linked in has `topk` as well, perhaps of another copy of ours; and
    where the embedded host is forced within a checkout, that has a `main` too.
    """
    folder = host.root / "apps"
    main = sys.modules.get("apps.main")
    if main is not None and Path(main.__file__).resolve().parent != (folder / "main").resolve():
        raise HostError(
            f"apps.main is already imported from {main.__file__}, but the host is {host.root}:"
            " import apps.topk before it, or start a new process"
        )
    others = [path for path in apps_path if path != str(folder)]
    without_main = [path for path in others if not Path(path, "main").is_dir()]
    with_main = [path for path in others if path not in without_main]
    apps_path[:] = [*without_main, str(folder), *with_main]


def _bind_lingua(host: Host) -> None:
    folder = (host.root / "lingua").resolve()
    loaded = sys.modules.get("lingua")
    if loaded is not None:
        where = [Path(entry).resolve() for entry in getattr(loaded, "__path__", [])]
        if where == [folder]:
            return
        raise HostError(
            f"a package called lingua is already imported from {where or loaded!r}, but the host"
            f" is {folder}: import apps before it, or start a new process"
        )
    spec = importlib.util.spec_from_file_location(
        "lingua", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["lingua"] = module
    spec.loader.exec_module(module)


def bind_or_exit(apps_path: MutableSequence[str]) -> None:
    """`bind`, for the import of `apps`: a user's mistake ends the program with one line."""
    try:
        bind(apps_path)
    except HostError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
