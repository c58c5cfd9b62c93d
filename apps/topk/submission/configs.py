"""The runs that are asked for: their configs, read and checked as far as it can be done here."""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from apps.topk import cli
from apps.topk.submission.arguments import SubmitArgs, eval_config_path
from lingua_topk._host.lingua.stool import with_absolute_paths
from lingua_topk.errors import ConfigError

if TYPE_CHECKING:
    from apps.topk.eval import EvalArgs
    from apps.topk.model import TopKTrainArgs

TRAIN_WORDS = "train.* on the command line"
EVAL_WORDS = "eval.* on the command line"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        file: the config that it comes from.
        config: what its job is given, every path absolute.
        args: the same, as training will read it.
        is_made: whether it is a twin that no file describes.
    """

    file: Path
    config: DictConfig
    args: "TopKTrainArgs"
    is_made: bool = False

    @property
    def name(self) -> str:
        return self.args.name

    @property
    def dump_dir(self) -> Path:
        return Path(self.config.dump_dir)

    @property
    def kind(self) -> str:
        topk = self.args.model.topk
        return "vanilla" if topk is None else f"TopK, k = {topk.k}"


def read_single(args: SubmitArgs) -> DictConfig:
    """The config of a job that is no sweep, for whichever program. ConfigError."""
    file = Path(str(args.config)).expanduser()
    if args.script == SubmitArgs.script:
        return read_run(file, args).config
    config = OmegaConf.merge(cli.read_yaml(str(file)), OmegaConf.create(args.train))
    with cli.naming(file):
        return with_absolute_paths(_resolved(config))


def read_run(file: Path, args: SubmitArgs) -> Run:
    """The run of one config with `train.*` merged over it. ConfigError."""
    layer = _in_sweep_dir(cli.read_yaml(str(file)), args, file)
    return _run(file, layer, OmegaConf.create(args.train))


def _run(file: Path, layer: DictConfig, words: DictConfig, is_made: bool = False) -> Run:
    from apps.topk.model import TopKTrainArgs  # with torch, which takes seconds

    train_args = cli.merge(TopKTrainArgs, (layer, str(file)), (words, TRAIN_WORDS))
    with cli.naming(file):
        _check_training(train_args)
        config = _resolved(OmegaConf.merge(layer, words))
        for key in ("name", "dump_dir"):
            if not isinstance(config.get(key), str) or not config[key]:
                raise ConfigError(f"{key}={config.get(key)} is no text: the job needs one")
        return Run(file, with_absolute_paths(config), train_args, is_made)


def _resolved(config: DictConfig) -> DictConfig:
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    return config


def _check_training(args: "TopKTrainArgs") -> None:
    """What training itself would refuse, wherever it runs."""
    from apps.topk import lingua_host
    from apps.topk.train import validate

    if not lingua_host.is_lingua():
        validate(args)
    elif args.model.topk is not None:  # the rest asks for a GPU, which may not be here
        args.model.topk.validate(args.model.n_layers)


def read_sweep(args: SubmitArgs) -> list[Run]:
    """The runs of `args.sweep` in their order, twins behind the run that they belong to."""
    written = [read_run(file, args) for file in _files(args.sweep)]
    by_name = {run.name: run for run in written}
    runs = []
    for run in written:
        runs.append(run)
        if not args.twins or run.args.model.topk is None:
            continue
        twin = _twin(run)
        same = by_name.get(twin.name)
        if same is None:
            runs.append(twin)
        elif same.args.model.topk is not None:
            raise ConfigError(
                f"{same.file}: name={same.name} is that of the vanilla twin of {run.file}, and it"
                " has model.topk: give another name, or twins=false"
            )
    _check_apart(runs)
    return runs


def _files(sweep: Any) -> list[Path]:
    """The configs that `sweep` names. ConfigError where it names none."""
    if isinstance(sweep, list):
        return [Path(str(one)).expanduser() for one in _not_empty(sweep, sweep)]
    path = Path(str(sweep)).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(
            f"sweep={sweep} is no folder: give one with configs, or files as sweep=[a.yaml,b.yaml]"
        )
    found = (one for one in path.iterdir() if one.suffix in (".yaml", ".yml") and one.is_file())
    return _not_empty(sorted(found, key=_by_numbers), sweep)


def _by_numbers(path: Path) -> list[Any]:
    """So that l8 comes before l16."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.name)]


def _not_empty(files: list[Any], sweep: Any) -> list[Any]:
    if not files:
        raise ConfigError(f"sweep={sweep} holds no config: give a folder with .yaml files")
    return files


def _in_sweep_dir(layer: DictConfig, args: SubmitArgs, file: Path) -> DictConfig:
    """The config with its dump_dir below sweep_dir, where one is given."""
    if args.sweep_dir is None:
        return layer
    name = layer.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[^/\0]+", name) or name in (".", ".."):
        raise ConfigError(f"{file}: name={name} is no name of a folder in sweep_dir: change it")
    return OmegaConf.merge(layer, {"dump_dir": str(Path(args.sweep_dir, name))})


def _twin(run: Run) -> Run:
    """The same but for model.topk, and a name and a folder of its own."""
    layer = OmegaConf.create(OmegaConf.to_container(run.config))
    OmegaConf.update(layer, "model.topk", None)
    layer.name = twin_of(run.name)
    layer.dump_dir = str(run.dump_dir.with_name(twin_of(run.dump_dir.name)))
    return _run(run.file, layer, OmegaConf.create({}), is_made=True)


def twin_of(name: str) -> str:
    """vanilla_d1024_l8 for topk_d1024_l8; vanilla_x for any other x."""
    renamed, n = re.subn(r"^topk(?![a-zA-Z0-9])", "vanilla", name)
    return renamed if n else f"vanilla_{name}"


def _check_apart(runs: list[Run]) -> None:
    """ConfigError where two runs would write to the same place, or look alike in tables."""
    for key in ("name", "dump_dir"):
        seen: dict[str, Run] = {}
        for run in runs:
            value = str(getattr(run, key))
            if value in seen:
                raise ConfigError(
                    f"{key}={value} is that of {_told(seen[value])} and of {_told(run)}: every run"
                    " needs its own"
                )
            seen[value] = run
    for run in runs:
        if run.args.checkpoint.path is not None:
            raise ConfigError(
                f"{run.file}: checkpoint.path={run.args.checkpoint.path} is not allowed in a sweep,"
                " whose runs have their checkpoints in dump_dir: leave it out"
            )


def _told(run: Run) -> str:
    return f"the vanilla twin of {run.file}" if run.is_made else str(run.file)


def read_evaluation(args: SubmitArgs, runs: list[Run]) -> DictConfig | None:
    """The config that every run is evaluated with; None for no evaluations.

    ConfigError, DataError for what apps.topk.eval would refuse of one of the runs.
    """
    file = eval_config_path(args)
    if file is None:
        return None
    from apps.topk.eval import EvalArgs

    layer, words = cli.read_yaml(str(file)), OmegaConf.create(args.eval)
    eval_args = cli.merge(EvalArgs, (layer, str(file)), (words, EVAL_WORDS))
    with cli.naming(file):
        # The folders whose names are numbers are those of training.
        if not re.fullmatch(r"[\w.@+-]+", eval_args.name) or re.fullmatch(
            r"[\d.]+", eval_args.name
        ):
            raise ConfigError(
                f"name={eval_args.name} is no name of a folder in evals/ beside those of training:"
                " take letters, not digits alone"
            )
        _check_evaluation(eval_args, runs)
    return OmegaConf.merge(layer, words, {"name": eval_args.name})


def _check_evaluation(eval_args: "EvalArgs", runs: list[Run]) -> None:
    from apps.topk.eval import check_eval

    # The tasks are the same for all, and to look them up takes seconds.
    if eval_args.harness is not None or eval_args.validation is None:
        dtype = runs[0].args.distributed.model_dtype
        check_eval(replace(eval_args, validation=None), {}, 0, dtype)
    if eval_args.validation is None:
        return
    held_out = replace(eval_args, harness=None)
    for run in runs:
        if not missing_data(run):
            data, dtype = run.args.data, run.args.distributed.model_dtype
            check_eval(held_out, asdict(data), data.seq_len, dtype)


def missing_data(run: Run) -> list[Path]:
    """The folders of its sources that are not on this machine."""
    data = run.args.data
    folders = [Path(data.root_dir or "", source) for source in data.sources]
    return [folder.absolute() for folder in folders if not folder.is_dir()]
