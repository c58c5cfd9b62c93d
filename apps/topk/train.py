"""Train a TopK language model, or its vanilla twin, with the host's training loop."""

import json
import logging
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from apps.topk import cli, data_files, lingua_host, nonfinite, resume
from apps.topk.checkpoint import file_digest
from apps.topk.eval import EvalArgs, check_eval, harness_help
from apps.topk.evaluation.results import DONE_NAME
from apps.topk.evaluation.sources import ValidationArgs
from apps.topk.model import TopKTrainArgs
from apps.topk.provenance import provenance, write_json
from apps.topk.records import set_aside_records, trim_records
from apps.topk.seam import install
from lingua.distributed import get_is_master, get_world_size
from lingua_topk import TopKArgs
from lingua_topk._host.lingua._ending import group_left_together
from lingua_topk.errors import ConfigError

logger = logging.getLogger(__name__)

PROGRAM = "apps.topk.train"
DESCRIPTION = """\
Train a TopK language model. Without a model.topk section (or with model.topk=null) the same
file trains the vanilla twin. Several processes:
  torchrun --nproc-per-node 8 -m apps.topk.train config=FILE [key=value ...]
The run continues from the newest checkpoint in its dump_dir, if there is one."""


def main() -> None:
    """The command line; a user's mistake ends the process with status 2."""
    cli.run(_main)


def _main() -> None:
    args = cli.read_config(TopKTrainArgs, PROGRAM, DESCRIPTION, _notes())
    train(args)


def train(args: TopKTrainArgs) -> None:
    """Check what is ours, write down what runs, and hand over to the host's loop."""
    validate(args)
    if lingua_host.is_finished(args):
        if get_is_master():
            print(f"this run has done its {args.steps} steps already; nothing to do")
        return
    args.tokenizer_sha256 = file_digest(args.data.tokenizer.path)
    changes = resume.check_unchanged(args)
    if _has_checkpoints(args):
        changes += data_files.check_unchanged(args)
    started, resumed = partial(_started, args, changes), partial(_resumed, args)
    with install(args, started, resumed) as train_module, group_left_together():
        train_module.train(args)


def _started(args: TopKTrainArgs, changes: list[str]) -> None:
    """The run is certain, and nothing of it is loaded yet."""
    lingua_host.log_supplied()
    lingua_host.set_aside_damaged(args)
    resume.log_start(args, changes)
    is_new = not _has_checkpoints(args)
    if is_new:
        set_aside_records(args.dump_dir)
    _write_provenance(args)
    if get_is_master():
        data_files.record(args, is_new)


def _has_checkpoints(args: TopKTrainArgs) -> bool:
    return any(resume.checkpoint_folder(args).glob("[0-9]*"))


def _resumed(args: TopKTrainArgs, step: int) -> None:
    trim_records(args.dump_dir, step)
    if get_is_master():
        for mark in Path(args.dump_dir, "evals").glob(f"[0-9]*/{DONE_NAME}"):
            if int(mark.parent.name) > step:  # made again, with its lines in the records
                mark.unlink()


def _write_provenance(args: TopKTrainArgs) -> None:
    """The host, versions and seeds of each start of the run: a list in provenance.json."""
    if not get_is_master():
        return
    origin = provenance(seed=args.seed, model_seed=args.model.seed, processes=get_world_size())
    logger.info("lingua_topk %s on the %s", origin["lingua_topk"], origin["host"])
    path = Path(args.dump_dir, "provenance.json")
    write_json(path, [*_earlier_starts(path), origin])


def _earlier_starts(path: Path) -> list[Any]:
    """What is in provenance.json; nothing where somebody damaged it."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return starts if isinstance(starts, list) else []


def validate(args: TopKTrainArgs) -> None:
    """ConfigError for what the host does not check before it writes."""
    lingua_host.validate(args)
    if any(step < 1 for step in args.save_at):
        raise ConfigError(f"save_at={args.save_at} is not allowed: give steps, counted from 1")
    nonfinite.validate(args.nonfinite)
    data_files.validate(args.changed_data)
    if args.eval is not None:
        _validate_eval(args)
    topk = args.model.topk
    if topk is None:
        return
    topk.validate(args.model.n_layers)
    if topk.annealed == "k" and topk.anneal_ratio and args.distributed.compile:
        raise ConfigError(
            "model.topk.annealed=k with distributed.compile=true: the model would be compiled again"
            " for every k on the way; use annealed=alpha or distributed.compile=false"
        )
    if topk.site == "mlp" and args.distributed.tp_size > 1:
        raise ConfigError(
            f"model.topk.site=mlp with distributed.tp_size={args.distributed.tp_size}: each process"
            " would select within its part of the hidden units; use site=residual or tp_size=1"
        )


def _validate_eval(args: TopKTrainArgs) -> None:
    """What the host would find out at the first evaluation only, hours later."""
    section = OmegaConf.create({"eval": args.eval})
    eval_args = cli.merge(_EvalSection, (section, "the config")).eval
    if eval_args.steer is not None:
        raise ConfigError(
            "eval.steer is set, and training evaluates the model as it is: leave it out, and"
            " evaluate a checkpoint with steer by python -m apps.topk.eval"
        )
    folders = [Path(args.data.root_dir or "", source) for source in args.data.sources]
    if not all(folder.is_dir() for folder in folders):
        return  # the host refuses that, with more to say
    check_eval(eval_args, asdict(args.data), args.data.seq_len, args.distributed.model_dtype)


@dataclass
class _EvalSection:
    """So that a mistake in the section is reported under its full name."""

    eval: EvalArgs = field(default_factory=EvalArgs)


def _notes() -> str:
    topk = yaml.safe_dump({"model": {"topk": asdict(TopKArgs())}}, sort_keys=False)
    validation = yaml.safe_dump({"eval": {"validation": asdict(ValidationArgs())}}, sort_keys=False)
    return (
        f"The section model.topk, where given, and its defaults:\n\n{topk}\n"
        "The section eval, where given: every checkpoint.eval.every steps and at the end, on the\n"
        f"*.val.jsonl files of the sources and on others that are named:\n\n{validation}\n"
        f"{harness_help('eval.')}"
    ).rstrip()


if __name__ == "__main__":
    main()
