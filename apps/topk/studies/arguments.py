"""The config of a study, and the runs that it makes."""

import copy
import inspect
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from omegaconf import OmegaConf

from apps.topk import cli
from apps.topk.analyze import analyze
from apps.topk.steer_eval import steer_eval
from lingua_topk.errors import ConfigError

if TYPE_CHECKING:
    from apps.topk.eval import EvalArgs
    from apps.topk.model import TopKTrainArgs

PROGRAM = "apps.topk.study"
EVALUATION = "evals/study"  # in the dump_dir of a run
# Flags of the programs that read a run that the study gives.
GIVEN = ("ckpt", "twin", "out", "analysis", "quiet")
# What is drawn at random in a run: its batches, its weights.
SEEDS = ("seed", "model.seed", "data.seed")


NOTES = """\
  dump_dir    holds a folder a run; summary.md, table.md (both also as .csv) and report.html
  train, set  the config of apps.topk.train that all runs share, and keys of it for all
  runs        by name the keys in which a run differs, as {topk: [], vanilla: [model.topk=null]}
  twin        the run that the others are compared with
  seeds       every run once with each; without any, once with the seeds of its config
  parallel    how many run at the same time
  eval        the config of apps.topk.eval for every run's last checkpoint; eval_set: keys of it
  read        the run whose neurons are read and steered, by apps.topk.analyze and steer_eval with
              the flags in analyze and steer; null for none
configs/study has studies to begin with, and what they gave."""


@dataclass
class StudyArgs:
    """What is trained, how it is judged, and which of it is read."""

    # Holds a folder a run, and the tables.
    dump_dir: str = ""
    # The config of apps.topk.train that all runs share, and keys of it for all of them.
    train: str = ""
    set: list[str] = field(default_factory=list)
    # By name, the keys in which a run differs.
    runs: dict[str, list[str]] = field(default_factory=dict)
    # The run that the others are compared with.
    twin: str = "vanilla"
    # Every run once with each; without any, once with the seeds of its config.
    seeds: list[int] = field(default_factory=list)
    # How many run at the same time; of the cores each has its share.
    parallel: int = 1
    # The config of apps.topk.eval for the last checkpoint of every run, and keys for it.
    eval: str = "configs/eval/validation.yaml"
    eval_set: list[str] = field(default_factory=list)
    # The run whose neurons are read and steered and of which a page is made (with the first seed);
    # with the flags of apps.topk.analyze and apps.topk.steer_eval.
    read: Optional[str] = None  # noqa: UP045 (OmegaConf 2.3 reads this spelling only)
    analyze: dict[str, Any] = field(default_factory=dict)
    steer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        kind: its name in the study, which runs of several seeds share.
        seed: None for that of the config.
        folder: its dump_dir.
        words: what apps.topk.train is called with.
        config: what they come to with the files that they name, as JSON.
    """

    kind: str
    seed: int | None
    folder: Path
    words: tuple[str, ...]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoint(self) -> Path:
        """Its last one, in training's layout."""
        return self.folder / "checkpoints" / f"{self.config['steps']:010d}"

    @property
    def evaluation(self) -> Path:
        return self.folder / EVALUATION


def check(args: StudyArgs) -> None:
    """ConfigError for what can be said of a study without its runs' configs."""
    for name in ("dump_dir", "train", "eval"):
        if not getattr(args, name):
            raise ConfigError(f"{name} is missing: a study needs dump_dir, train, runs and eval")
    if not args.runs:
        raise ConfigError("runs is empty: name at least one, as in topk: []")
    for name in args.runs:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ConfigError(
                f"runs: {name!r} cannot be a folder's name: use letters, digits, -, _ and dots"
            )
    for name, path in (("eval", args.eval), ("analyze.vectors", args.analyze.get("vectors"))):
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name}={path} is not there (from {Path.cwd()}): give another path")
    if args.twin not in args.runs:
        raise ConfigError(f"twin={args.twin} is none of the runs: choose of {', '.join(args.runs)}")
    others = [name for name in args.runs if name != args.twin]
    if args.read is not None and args.read not in others:
        raise ConfigError(
            f"read={args.read} is none of the runs that are compared with the twin: choose of"
            f" {', '.join(others)}, or null"
        )
    for section, program in (("analyze", analyze), ("steer", steer_eval)):
        known = [name for name in inspect.signature(program).parameters if name not in GIVEN]
        for name in getattr(args, section):
            if name not in known:
                raise ConfigError(f"{section}.{name} is no known key: {cli.nearest(name, known)}")
    if args.parallel < 1:
        raise ConfigError(f"parallel={args.parallel} is too small: give at least 1")
    if len(set(args.seeds)) != len(args.seeds):
        raise ConfigError(f"seeds={list(args.seeds)} has one twice: give different ones")


def runs_of(args: StudyArgs) -> list[Run]:
    """All runs, seed by seed; ConfigError where one of them cannot be trained, or evaluated."""
    check(args)
    evaluation, runs = _read_evaluation(args), []
    seeds = args.seeds or [None]
    for seed in seeds:
        for kind in args.runs:
            run, config = _run(args, kind, seed)
            if seed == seeds[0]:  # the others are the same but for theirs
                with cli.naming(f"runs.{kind}"):
                    _check_run(config, is_twin=kind == args.twin)
                with cli.naming(f"eval={args.eval}"):
                    _check_evaluation(evaluation, config, are_tasks_known=bool(runs))
            runs.append(run)
    return runs


def evaluation_config(args: StudyArgs) -> dict[str, Any]:
    """What the evaluation of every run comes to, as JSON. ConfigError."""
    return plain(_read_evaluation(args))


def _read_evaluation(args: StudyArgs) -> "EvalArgs":
    from apps.topk.eval import EvalArgs

    return cli.read_config(EvalArgs, "eval", "", argv=[f"config={args.eval}", *args.eval_set])


def plain(args: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them."""
    return json.loads(json.dumps(asdict(args), default=str), parse_constant=str)


def _run(args: StudyArgs, kind: str, seed: int | None) -> tuple[Run, "TopKTrainArgs"]:
    from apps.topk.model import TopKTrainArgs

    name = kind if seed is None else f"{kind}-seed{seed}"
    folder = Path(args.dump_dir, name)
    seeded = [] if seed is None else [f"{key}={seed}" for key in SEEDS]
    words = [
        f"config={args.train}", *args.set, *args.runs[kind], *seeded, f"name={name}",
        f"dump_dir={folder}",
    ]  # fmt: skip
    config = cli.read_config(TopKTrainArgs, f"run {kind}", "", argv=words)
    # Before the checks of it, which fill in what follows from the rest.
    return Run(kind, seed, folder, tuple(words), plain(config)), config


def _check_run(config: "TopKTrainArgs", is_twin: bool) -> None:
    """What training would refuse, hours later where other runs come before it."""
    from apps.topk import lingua_host, train

    root = Path(config.data.root_dir or "")
    needed = [*(root / source for source in config.data.sources), config.data.tokenizer.path]
    for path in needed:
        if path is not None and not Path(path).exists():
            raise ConfigError(
                f"{path} is not there (from {Path.cwd()}): prepare the text first, by python -m"
                " apps.topk.prepare"
            )
    if is_twin and config.model.topk is not None:
        raise ConfigError(
            "this is the twin and has TopK: give it model.topk=null, or name another twin"
        )
    train.validate(config)
    if not lingua_host.is_lingua():
        from apps.main.train import validate_train_args
        from lingua.tokenizer import build_tokenizer

        tokenizer = build_tokenizer(config.data.tokenizer.name, config.data.tokenizer.path)
        validate_train_args(copy.deepcopy(config), tokenizer.n_words)


def _check_evaluation(
    evaluation: "EvalArgs", config: "TopKTrainArgs", are_tasks_known: bool
) -> None:
    """What the evaluation would refuse, after the training; to look up tasks takes seconds."""
    from apps.topk.eval import check_eval

    if are_tasks_known and evaluation.validation is not None:
        evaluation = replace(evaluation, harness=None)
    check_eval(evaluation, asdict(config.data), config.data.seq_len, config.distributed.model_dtype)


def read_arguments(argv: list[str], description: str) -> StudyArgs:
    """The study of `config=FILE key=value ...`; mappings as plain Python."""
    args = cli.read_config(StudyArgs, PROGRAM, description, NOTES, argv)
    for name in ("analyze", "steer", "runs"):
        value = getattr(args, name)
        if OmegaConf.is_config(value):
            setattr(args, name, OmegaConf.to_container(value))
    return args
