"""What is asked for: the keys of stool, and those of a sweep. Without torch."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from apps.topk.provenance import ROOT
from lingua_topk._host.lingua.stool import LEAST_TIME, StoolArgs, is_sbatch
from lingua_topk.errors import ConfigError

EVAL_CONFIG = "configs/eval/paper.yaml"


@dataclass
class SubmitArgs(StoolArgs):
    """Stool's keys, with defaults for TopK, and ours."""

    script: str = "apps.topk.train"
    nodes: int = 1
    # Merged over every config, before the twin is made: train.steps=100 train.data.root_dir=...
    train: dict[str, Any] = field(default_factory=dict)
    # In place of config: a folder of configs, or a list of files. The keys below go with it.
    sweep: Optional[Any] = None  # noqa: UP045 (OmegaConf reads this spelling only)
    # Also the vanilla twin of every TopK config: model.topk=null, vanilla_... for topk_...
    twins: bool = True
    # Holds the runs, each in a folder of its name, and sweep/; null: where the configs say.
    sweep_dir: Optional[str] = None  # noqa: UP045
    max_parallel: int = 0  # runs at a time; 0: as many as there is room for
    eval_config: Optional[str] = EVAL_CONFIG  # noqa: UP045 (null: no evaluations)
    eval: dict[str, Any] = field(default_factory=dict)  # merged over eval_config
    eval_ngpu: int = 0  # of the one node that evaluates; 0: ngpu
    eval_time: int = -1  # minutes; -1: as much as the partition allows


# What has no meaning for a single config.
OF_A_SWEEP = ("sweep_dir", "max_parallel", "eval", "eval_ngpu", "eval_time")


def check(args: SubmitArgs) -> None:
    """ConfigError for keys that do not go together."""
    if (args.config is None) == (args.sweep is None):
        raise ConfigError(
            "give config=FILE for one run, or sweep=FOLDER for a run of every config in it and its"
            f" vanilla twin, and not both (config={args.config}, sweep={args.sweep})"
        )
    if args.sweep is None:
        _check_single(args)
    else:
        _check_sweep(args)


def _check_single(args: SubmitArgs) -> None:
    default = SubmitArgs()
    names = (*OF_A_SWEEP, "twins", "eval_config")
    given = [name for name in names if getattr(args, name) != getattr(default, name)]
    if given:
        value = "null" if getattr(args, given[0]) is None else getattr(args, given[0])
        raise ConfigError(
            f"{given[0]}={value} goes with sweep, and config={args.config} is one run: write"
            f" sweep=[{args.config}] (twins=false for that run alone), or leave it out"
        )


def _check_sweep(args: SubmitArgs) -> None:
    if args.script != SubmitArgs.script:
        raise ConfigError(f"script={args.script}: a sweep is of {SubmitArgs.script}: leave it out")
    if args.override:
        raise ConfigError(
            "override=true would delete the folders of several runs: delete them yourself, or give"
            " dirs_exists_ok=true to go on in them"
        )
    for name in ("max_parallel", "eval_ngpu"):
        if getattr(args, name) < 0:
            raise ConfigError(f"{name}={getattr(args, name)} is too small: give 0 or more")
    if args.eval_time == 0 or args.eval_time < -1:
        raise ConfigError(
            f"eval_time={args.eval_time} is not allowed: give minutes, or -1 for all there is"
        )
    if 0 < args.eval_time < LEAST_TIME and is_sbatch(args.launcher):
        raise ConfigError(f"eval_time={args.eval_time} is too short: give at least {LEAST_TIME}")
    if not is_sbatch(args.launcher) and args.launcher != "bash":
        raise ConfigError(
            f"launcher={args.launcher!r} cannot start a sweep: give sbatch (with options of it, if"
            " you like), or bash to run it here"
        )
    for name in ("ckpt_dir", "dump_dir"):
        if name in args.eval:
            raise ConfigError(
                f"eval.{name}={args.eval[name]} would be that of all evaluations: each is of the"
                " last checkpoint of its run, in evals/ there; leave it out"
            )
    for name in ("name", "dump_dir"):
        if name in args.train:
            raise ConfigError(
                f"train.{name}={args.train[name]} would be that of all runs: they keep their own;"
                " give sweep_dir=FOLDER to have them elsewhere"
            )


def stool_args(args: SubmitArgs, **changes: Any) -> StoolArgs:
    """Stool's part of `args`, with changes."""
    kept = {one.name: getattr(args, one.name) for one in fields(StoolArgs)}
    return StoolArgs(**{**kept, **changes})


def eval_config_path(args: SubmitArgs) -> Path | None:
    """The file of eval_config, None without; the default is found wherever one is."""
    if args.eval_config is None:
        return None
    path = Path(args.eval_config).expanduser()
    if args.eval_config == EVAL_CONFIG and not path.is_file():
        path = ROOT / EVAL_CONFIG
    if not path.is_file():
        raise ConfigError(
            f"eval_config={args.eval_config} is not a file: give a config of apps.topk.eval, or"
            " null for no evaluations"
        )
    return path
