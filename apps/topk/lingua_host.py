"""What Meta Lingua (437d680) lacks or gets wrong beside current libraries, and we need.

Supplied where that is harmless, with a line in the log; refused with what to do elsewhere.
Nothing here has an effect on the embedded host. The table in the README lists the cases.
"""

import importlib.util
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from lingua_topk import host
from lingua_topk._host.lingua import _requeue
from lingua_topk.errors import CheckpointError, ConfigError, HostError

logger = logging.getLogger(__name__)

# What the checkout imports before it trains, beyond the standard library and torch.
NEEDED = ("numpy", "omegaconf", "sentencepiece", "tiktoken", "lm_eval", "wandb", "xformers")

# Said once the run's log is open.
_supplied: list[str] = []


def is_lingua() -> bool:
    """Whether the bound host is a checkout of Meta Lingua."""
    bound = host.bound()
    return bound is not None and bound.kind == "lingua"


def supply_missing_or_exit() -> None:
    """`supply_missing`, for an import: a HostError ends the program with one line."""
    if not is_lingua():
        return
    try:
        supply_missing()
    except HostError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None


def supply_missing() -> None:
    """Make `apps.main.train` of a checkout importable. HostError for packages not installed.

    Called before the checkout is imported: a half import would stay in `sys.modules`.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise HostError(
            f"the {host.bound().describe()} needs {', '.join(missing)}, not installed here: run"
            f" ./setup.sh lingua {host.bound().root}, or set {host.HOST_VARIABLE}=embedded"
        )
    _supply_flash_operator()


def _supply_flash_operator() -> None:
    """Lingua looks up an operator, as a key of a table, that some builds of xformers lack."""
    import torch
    import xformers.ops  # registers the operator, where it has it

    try:
        torch.ops.xformers_flash.flash_fwd.default  # noqa: B018
    except AttributeError:
        # It is never called: without it nothing of the kind can appear in a forward pass.
        torch.library.define("xformers_flash::flash_fwd", "(Tensor x) -> Tensor")
        _supplied.append(
            f"xformers {xformers.__version__} with torch {torch.__version__} registers no"
            " xformers_flash::flash_fwd, which Lingua looks up: a name without a body stands in"
        )


def log_supplied() -> None:
    """Say what was supplied, in the log of the run."""
    for line in _supplied:
        logger.info("%s", line)


def validate(args: Any) -> None:
    """ConfigError for what the checkout's loop would only find out, or get wrong, later.

    args: the training arguments.
    """
    if not is_lingua():
        return
    check_device()
    _validate_loss()
    _validate_data(args)
    _validate_processes(args)
    if args.checkpoint.init_ckpt_path:
        check_without_code(Path(args.checkpoint.init_ckpt_path))
    if args.eval is None:
        return
    if args.async_eval_gpus is not None:
        raise ConfigError(
            f"async_eval_gpus={args.async_eval_gpus}: Meta Lingua would start its own evaluator,"
            " which ignores model.topk: set it to null, and evaluate between two training steps"
        )
    every = args.checkpoint
    if args.steps % every.dump.every and args.steps % every.eval.every:
        raise ConfigError(
            f"steps={args.steps} with eval: Meta Lingua evaluates the last step before it saves it,"
            " so it would score an earlier checkpoint: make steps a multiple of"
            f" checkpoint.dump.every={every.dump.every} or"
            f" checkpoint.eval.every={every.eval.every}"
        )


def check_device() -> None:
    """HostError without a GPU, where Lingua's loop would find out after it has begun to write."""
    import torch

    if torch.cuda.device_count() == 0:
        raise HostError(
            f"the {host.bound().describe()} needs a CUDA device, and there is none: set"
            f" {host.HOST_VARIABLE}=embedded, which runs on CPUs too"
        )


def check_without_code(folder: Path) -> None:
    """CheckpointError for a distributed checkpoint with more than data in it.

    Lingua loads by torch's own reader, which runs what its pickles say. Where .metadata cannot be
    read, be it a folder, that reader takes the index of the process: __0.metadata.
    """
    if not is_lingua():
        return
    if not os.path.lexists(folder / ".metadata") and not any(folder.glob("__*.metadata")):
        return
    from lingua_topk._host.lingua._index import find_code

    problem = find_code(folder)
    if problem:
        raise CheckpointError(f"{folder} is not loaded: {problem}: use another checkpoint")


def _validate_loss() -> None:
    """ConfigError for a loss that is asked for of the embedded host, which alone has others."""
    loss = os.environ.get("LINGUA_TOPK_LOSS") or "auto"
    if loss not in ("auto", "plain"):
        raise ConfigError(
            f"LINGUA_TOPK_LOSS={loss}: Meta Lingua has its own loss alone: leave it out, or set"
            f" {host.HOST_VARIABLE}=embedded"
        )


def _validate_data(args: Any) -> None:
    """ConfigError for what Lingua would answer with an assertion or a division by zero."""
    from lingua.distributed import get_world_size

    tokenizer = args.data.tokenizer
    if tokenizer.name != "bytes" and not Path(tokenizer.path or "").is_file():
        raise ConfigError(
            f"data.tokenizer.path={tokenizer.path} is not a file (from {Path.cwd()}): give the"
            " path of the tokenizer that apps.topk.prepare made"
        )
    readers = get_world_size() // max(args.distributed.tp_size, 1)
    for source in args.data.sources:
        folder = Path(args.data.root_dir or "", source)
        chunks = len(list(folder.glob("*.chunk.*.jsonl")))
        if chunks == 0:
            raise ConfigError(
                f"data.sources: {source} is no folder with *.chunk.*.jsonl files in"
                f" data.root_dir={args.data.root_dir} (looked for {folder} from {Path.cwd()}):"
                " prepare it with python -m apps.topk.prepare, or correct the name"
            )
        if chunks > readers or readers % chunks:
            raise ConfigError(
                f"data.sources: {source} has {chunks} chunks for {readers} processes: Meta Lingua"
                " needs as many processes as chunks, or a multiple (it drops the others); prepare"
                f" with another --chunks, or set {host.HOST_VARIABLE}=embedded"
            )


def _validate_processes(args: Any) -> None:
    """Lingua goes on with any number, each from the newest checkpoint that it has a part in."""
    from lingua.distributed import get_world_size
    from lingua_topk._host.lingua._manifest import n_writers

    whole = [folder for folder in _checkpoints(args) if _damage(folder) is None]
    if whole and n_writers(whole[-1]) != get_world_size():
        raise ConfigError(
            f"{whole[-1]} was saved by {n_writers(whole[-1])} processes, and this run has"
            f" {get_world_size()}: Meta Lingua would give some of them other weights; start as"
            f" many, or set {host.HOST_VARIABLE}=embedded, which goes on with any number"
        )


def _checkpoints(args: Any) -> list[Path]:
    """What Lingua takes for checkpoints of the run, oldest first."""
    folder = Path(args.checkpoint.path or Path(args.dump_dir, "checkpoints"))
    found = (path for path in folder.glob("*") if re.fullmatch(r"\d{10,}", path.name))
    return sorted(found, key=lambda path: int(path.name))


def set_aside_damaged(args: Any) -> None:
    """Rename checkpoints that a kill left half-written; every process calls it.

    Lingua writes them in place, and each process looks for itself which is the newest: one
    that lacks a file would have the processes go on from different steps.

    CheckpointError, in all processes and with nothing renamed, where the newest that is not
    damaged cannot be looked through: what is wrong with it may be wrong with all of them, and
    with all of them aside the run would begin anew.
    """
    if not is_lingua():
        return
    from lingua.distributed import get_is_master
    from lingua_topk._host.lingua._manifest import from_first

    refusal = from_first(_set_aside_damaged(_checkpoints(args)) if get_is_master() else None)
    if refusal:
        raise CheckpointError(refusal)


def _set_aside_damaged(folders: list[Path]) -> str | None:
    """By one process, for all; why the run must end, or None. folders: oldest first."""
    from lingua_topk._host.lingua._index import find_code

    damaged: dict[Path, str] = {}
    is_newest = True
    for folder in reversed(folders):
        hindrance = _hindrance(folder)
        damage = None if hindrance else _damage(folder)
        if damage:
            damaged[folder] = damage
            continue
        problem = (hindrance or find_code(folder)) if is_newest else None
        is_newest = False
        if problem:
            return f"{folder} is not loaded: {problem}: move it away to go on from an earlier one"
    for folder, damage in damaged.items():
        aside = folder.with_name(f"damaged_{folder.name}")
        logger.warning("%s is set aside as %s: %s", folder, aside.name, damage)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return None


def _hindrance(folder: Path) -> str | None:
    """Why it cannot be told of a checkpoint whether it is damaged, or None: no kill leaves that."""
    from lingua_topk._host.lingua._index import find_unlisted

    try:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                with open(path, "rb") as file:
                    file.read(1)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    return find_unlisted(folder)


def _damage(folder: Path) -> str | None:
    """What a checkpoint lacks, or None."""
    from lingua_topk._host.lingua._manifest import damage_without_manifest

    if not any(folder.glob("train_state_*.json")):
        return "it has no train_state files"
    return damage_without_manifest(folder)


class Stops(dict):
    """In place of Lingua's `preemption_flag`: a signal ends the run after a whole step, on all.

    Lingua asks for "flag" after every micro-batch, each process its own: a save in
    mid-accumulation loses the gradients that are added up, and a signal that arrives at
    different moments has processes wait for each other for ever. It hears SIGUSR2 only, and
    asks SLURM to requeue the job whether there is a SLURM or not.
    """

    def __init__(self):
        super().__init__(flag=False)
        self._ends = False  # not to be requeued
        self._handlers: dict[int, Any] = {}  # those before ours
        self.is_step_done = True

    def listen(self) -> None:
        """SIGTERM and Ctrl-C end the run like SIGUSR2; a second Ctrl-C does not wait."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._end)

    def stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _end(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)
        logger.warning("signal %s: saving and ending after this step", signal.Signals(signum).name)
        self._ends = not super().__getitem__("flag")  # a limit announced by SIGUSR2 stays one
        self["flag"] = True

    def __getitem__(self, name: str) -> bool:
        if not self.is_step_done:
            return False
        from lingua.distributed import dist_max

        return bool(dist_max(int(super().__getitem__(name))).item())

    def requeue(self) -> None:
        """Where it can be and is wanted; ends with status 1 where SLURM does not take the job.

        Lingua's own drops what scontrol answers, and asks by the number of the whole array, by
        which all its elements would be requeued.
        """
        from lingua.distributed import get_is_master

        if not get_is_master():
            return
        can = _requeue.is_slurm_job() and os.environ.get("LAUNCH_WITH") != "DORA"
        if not can or (self._ends and not _requeue.is_preempted()):
            logger.info("saved; start the run again to go on")
        elif not _requeue.requeue():
            sys.exit(1)


def is_finished(args: Any) -> bool:
    """Whether the run has done all its steps already, on which Meta Lingua's loop breaks."""
    if not is_lingua():
        return False
    done = [folder for folder in _checkpoints(args) if int(folder.name) >= args.steps]
    return any(_damage(folder) is None for folder in done)
