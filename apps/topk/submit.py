"""Submit a run as a SLURM job, or a sweep of runs as a job array with evaluations behind it."""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from apps.topk import cli, lingua_host
from apps.topk.submission import arguments
from apps.topk.submission.arguments import SubmitArgs, stool_args
from lingua_topk._host.lingua.stool import as_written
from lingua_topk.errors import ConfigError

PROGRAM = "apps.topk.submit"
HELP = f"""\
usage: python -m {PROGRAM} config=FILE partition=NAME [key=value ...]
       python -m {PROGRAM} sweep=FOLDER partition=NAME [key=value ...]

{__doc__}
Jobs run a copy of the code as it is now. config is what python -m lingua.stool does, on either
host: code.N/, base_config.yaml, submit.slurm and logs/ go to the config's dump_dir.

sweep=configs/paper takes every config of a folder, sweep=[a.yaml,b.yaml] those named: each is a
run, and its vanilla twin is another (model.topk=null, vanilla_... for topk_... in name and
dump_dir). They are one job array, and their evaluations by eval_config another, of which an
element starts when the run of its number has ended well. Evaluations go to DUMP_DIR/evals/NAME,
by the name in eval_config, the sweep's own files into a folder sweep/ beside the runs. A run
that reaches its time limit saves, goes back into the queue and on from there.

A node has ngpu GPUs and as many processes (8; a small model wants ngpu=1), ncpu CPUs for each.
mem is a node's memory. Empty, a job asks for all of it, and where SLURM counts memory no other job
has a place beside it: with fewer GPUs than the node has give a number, as mem=64G.

Keys of the runs are given with train. in front (config=FILE too), of all evaluations with eval.:
  sweep=configs/paper sweep_dir=dumps/trial train.steps=100 eval.harness.limit=10

dry_run=true prints scripts and runs, and writes nothing. launcher=bash runs all here, one after
the other: by srun within an allocation, by torchrun without SLURM (ngpu processes).

Keys and defaults, those of stool first:
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends the process with status 2."""
    cli.run(lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(HELP + OmegaConf.to_yaml(OmegaConf.structured(SubmitArgs())).rstrip())
        return
    words = cli.dot_list(argv)
    as_written(words, argv)
    _check_words(words)
    args = cli.merge(SubmitArgs, (words, "the command line"))
    arguments.check(args)
    if lingua_host.is_lingua():
        # Whose scripts take the environment's programs from the path, activated or not.
        found = [str(Path(sys.executable).parent), os.environ["PATH"]]
        os.environ["PATH"] = os.pathsep.join(found)
    status = _submit_single(args) if args.sweep is None else _submit_sweep(args)
    if status:
        raise SystemExit(status)


def _check_words(words: DictConfig) -> None:
    """ConfigError for a key of the runs that is given as one of the submission."""
    for name in set(words) - {one.name for one in fields(SubmitArgs)}:
        from apps.topk.model import TopKTrainArgs  # with torch, which takes seconds

        if name in {one.name for one in fields(TopKTrainArgs)}:
            raise ConfigError(
                f"{name} is a key of the runs, not of the submission: write train.{name}..., as in"
                " train.steps=1000"
            )


def _submit_single(args: SubmitArgs) -> int:
    from apps.topk.submission import configs, scripts, slurm
    from lingua_topk._host.lingua.stool import is_sbatch, launch, start

    config = configs.read_single(args)
    starts = slurm.submit_single if is_sbatch(args.launcher) else start
    return launch(stool_args(args, config=config), scripts.text_of, starts)


def _submit_sweep(args: SubmitArgs) -> int:
    from apps.topk.submission.sweep import submit_sweep

    return submit_sweep(args)


if __name__ == "__main__":
    main()
