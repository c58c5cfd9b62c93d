"""Run lm-eval's tasks one after the other, so that an evaluation that is killed goes on.

Each finished task lies in a file of its own until all are done.
"""

import difflib
import functools
import json
import logging
import math
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

from apps.main.eval import LMHarnessArgs
from apps.topk import cli
from apps.topk.evaluation.processes import broadcast, rank_and_size
from apps.topk.provenance import ROOT, write_json
from lingua_topk.errors import ConfigError, DataError, UserError

logger = logging.getLogger(__name__)

WORK_FOLDER = "tasks"  # below the evaluation's dump_dir
# Of lm-eval's results: a dict by task each; of the rest there is one for all tasks.
BY_TASK = (
    "results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better",
    "n-samples", "samples",
)  # fmt: skip
# What `simple_evaluate` takes from elsewhere, or what has no meaning for one model on its device.
NOT_PASSED = ("tasks", "device", "verbosity", "include_path", "batch_tokens", "add_bos")


@dataclass
class HarnessArgs(LMHarnessArgs):
    """Keyword arguments of lm-eval's `simple_evaluate`, as in Meta Lingua, and ours."""

    # A folder of tasks of one's own. It can hold Python, which lm-eval runs.
    include_path: Optional[str] = None  # noqa: UP045 (OmegaConf reads this spelling only)
    # Tokens a batch, padding included.
    batch_tokens: int = 4096
    # bos before a text; null: as in training.
    add_bos: Optional[bool] = None  # noqa: UP045
    # lm-eval's consent to tasks that run the code that a model writes.
    confirm_run_unsafe_code: bool = False


def check_harness(args: HarnessArgs, section: str = "harness") -> None:
    """ConfigError for what is not allowed and for unknown tasks; nothing is loaded."""
    if not args.tasks:
        raise ConfigError(f"{section}.tasks is empty: name at least one task, or leave harness out")
    if args.batch_tokens < 1:
        raise ConfigError(
            f"{section}.batch_tokens={args.batch_tokens} is too small: give 1 or more"
        )
    if args.limit is not None and not args.limit > 0:
        raise ConfigError(
            f"{section}.limit={args.limit} is not allowed: give a number of documents"
        )
    if args.apply_chat_template:
        raise ConfigError(
            f"{section}.apply_chat_template={args.apply_chat_template}: these tokenizers have no"
            " chat template; set it to false"
        )
    if args.use_cache is not None or args.cache_requests:
        raise ConfigError(
            f"{section}.use_cache and cache_requests cannot be used: lm-eval's caches know a text"
            " or a task by its name alone, and would answer for another checkpoint or another"
            " file; leave them out (finished tasks are kept until the evaluation is done)"
        )
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise ConfigError(
            f"{section}.include_path={args.include_path} is not a folder: make one with"
            " python -m apps.topk.tasks, or give the folder that your tasks lie in"
        )
    _check_names(args, section)


def name_of(spec: Any) -> str:
    """The name of a task as `tasks` gives it: itself, or a mapping with it under `task`."""
    return str(spec.get("task") or spec.get("group") if isinstance(spec, dict) else spec)


def _check_names(args: HarnessArgs, section: str) -> None:
    manager = _manager(args)
    known = set(manager.all_tasks)
    names = [name_of(spec) for spec in args.tasks]
    for spec, name in zip(args.tasks, names, strict=True):
        if isinstance(spec, dict) and ("group" in spec or name in manager.all_groups):
            raise ConfigError(
                f"{section}.tasks: lm-eval takes no settings for a group ({name}): name its tasks"
                " one by one, or write the group into a YAML file below include_path"
            )
        makes_one = isinstance(spec, dict) and "dataset_path" in spec
        if name in known or makes_one or Path(name).is_file():
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        raise ConfigError(
            f"{section}.tasks: {name!r} is no task of lm-eval"
            + (f" and none below {args.include_path}" if args.include_path else "")
            + (f": did you mean {close[0]}?" if close else ": lm-eval ls tasks lists them all")
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"{section}.tasks names {', '.join(twice)} more than once: once is enough"
        )


def _manager(args: HarnessArgs):
    """Of the folder alone, where it has all: a group in it can have members from elsewhere."""
    own = _task_manager(args.include_path, include_defaults=False) if args.include_path else None
    if own is not None and {name_of(spec) for spec in args.tasks} <= set(own.all_subtasks):
        return own
    return _task_manager(args.include_path, include_defaults=True)


@functools.lru_cache
def _task_manager(include_path: str | None, include_defaults: bool):
    """lm-eval's index of tasks, of which reading its own takes seconds."""
    from lm_eval.tasks import TaskManager

    # It warns of its own tasks, about which a user can do nothing.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def run_tasks(
    model: Any, args: HarnessArgs, folder: Path, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """The results of all tasks in the form of `simple_evaluate`; None but in process 0.

    model: an `adapter.HarnessModel`. settings: JSON that tells a finished task of this
    evaluation from one of another. DataError for a task whose documents cannot be had.
    """
    import lm_eval

    manager = _manager(args)
    options = {one.name: getattr(args, one.name) for one in fields(args)}
    settings = {
        **settings, "lm_eval": lm_eval.__version__, "options": {**options, "tasks": None},
        "files": _files_below(args.include_path),
    }  # fmt: skip
    found = {name_of(spec): _finished(_file(folder, spec), spec, settings) for spec in args.tasks}
    done = {name: results for name, results in found.items() if results is not None}
    are_done = broadcast(list(done))
    left = [spec for spec in args.tasks if name_of(spec) not in are_done]
    if are_done:
        logger.info("done before: %s", ", ".join(are_done))
    _check_loadable(manager, left)
    for number, spec in enumerate(left, start=len(are_done) + 1):
        logger.info("task %d of %d: %s", number, len(args.tasks), name_of(spec))
        model.label = f"{name_of(spec)} ({number} of {len(args.tasks)})"
        results = _evaluate(lm_eval, model, spec, manager, options)
        if rank_and_size()[0] == 0:
            done[name_of(spec)] = _plain(results)
            content = {"settings": settings, "spec": spec, "results": done[name_of(spec)]}
            write_json(_file(folder, spec), _plain(content))
    if rank_and_size()[0] != 0:
        return None
    return _merged([done[name_of(spec)] for spec in args.tasks])


def forget_work(folder: Path) -> None:
    """Remove the files of the single tasks, once their results are elsewhere."""
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)


def _check_loadable(manager: Any, specs: Sequence[Any]) -> None:
    """Every task's documents are there: better known before the work than after.

    Process 0 looks, and so downloads alone.
    """
    problem = _problem(manager, specs) if rank_and_size()[0] == 0 else None
    problem = broadcast(problem)
    if problem is not None:
        raise DataError(problem)


def _problem(manager: Any, specs: Sequence[Any]) -> str | None:
    for spec in specs:
        try:
            manager.load(_specs(manager, spec))
        except Exception as error:  # of the hub, of datasets, of a task's own Python
            what = f"harness.tasks: {name_of(spec)} cannot be loaded ({_said(error)})"
            if isinstance(error, ConnectionError | FileNotFoundError):
                return (
                    f"{what}: where there is no network, download it elsewhere and set HF_HOME,"
                    " HF_HUB_OFFLINE=1 and HF_DATASETS_OFFLINE=1, or make local tasks with"
                    " python -m apps.topk.tasks and give harness.include_path and harness.tasks"
                )
            return f"{what}: correct its files, or leave it out"
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {cli.one_line(str(error))[:300]}"


def _evaluate(lm_eval: Any, model: Any, spec: Any, manager: Any, options: dict[str, Any]) -> Any:
    passed = {name: value for name, value in options.items() if name not in NOT_PASSED}
    if rank_and_size()[0] != 0:
        passed["bootstrap_iters"] = 0  # its result is not used
    specs = _specs(manager, spec)
    try:
        return lm_eval.simple_evaluate(model=model, tasks=specs, task_manager=manager, **passed)
    except UserError:
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        logger.debug("%s", name_of(spec), exc_info=True)
        raise DataError(
            f"harness.tasks: {name_of(spec)} cannot be evaluated ({_said(error)}): correct its"
            " files, or leave it out"
        ) from None


def _is_ours(error: Exception) -> bool:
    """Whether it was raised by code of this project, which is then in error itself."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(raised_in.is_relative_to(ROOT / name) for name in ("apps", "lingua_topk"))


def _specs(manager: Any, spec: Any) -> list[Any]:
    """What lm-eval takes for one of ours: a name, or what it built where there are settings.

    lm-eval lets the members of a group have other settings, but not a task by itself.
    """
    name = name_of(spec)
    if not isinstance(spec, dict) or name not in manager.all_tasks:
        return [spec]
    rest = {key: value for key, value in spec.items() if key != "task"}
    members = [name]
    if name in manager.all_tags:
        members = sorted(manager.task_index[name].tags)
    group = manager.load([{"group": name, "task": [{"task": one, **rest} for one in members]}])
    return list(group["tasks"].values())


def _files_below(folder: str | None) -> list[Any]:
    """Name, size and time of the files of a task folder: another list where one changed."""
    if folder is None:
        return []
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    states = [(path, path.stat()) for path in files]
    return [[str(path), state.st_size, state.st_mtime_ns] for path, state in states]


def _file(folder: Path, spec: Any) -> Path:
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name_of(spec))
    return folder / WORK_FOLDER / f"{name}.json"


def _finished(path: Path, spec: Any, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a task gave when it was done with these settings; None where it was not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same = (content["spec"], content["settings"]) == (_plain(spec), _plain(settings))
        return content["results"] if same else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key in BY_TASK and isinstance(value, dict):
                merged.setdefault(key, {}).update(value)
            else:
                merged.setdefault(key, value)
    return merged


def _plain(content: Any) -> Any:
    """As JSON can hold it: numbers of numpy as numbers, NaN and infinities as null."""
    from lm_eval.utils import handle_non_serializable

    return _finite(json.loads(json.dumps(content, default=handle_non_serializable)))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
