"""A sweep: all is read and checked, then written, then started."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from apps.topk import cli
from apps.topk.provenance import write_text
from apps.topk.submission import configs, here, slurm
from apps.topk.submission.arguments import SubmitArgs, stool_args
from apps.topk.submission.configs import Run
from apps.topk.submission.scripts import Job, array_text, text_of
from lingua_topk._host.lingua import stool
from lingua_topk._host.lingua.stool import StoolArgs
from lingua_topk.errors import ConfigError

EVALUATE = "apps.topk.submission.evaluate"
FOLDER = "sweep"


@dataclass(frozen=True)
class Sweep:
    """What is submitted: runs, and the evaluation of each at the same place in the list.

    Attributes:
        folder: of the sweep's own files.
        code: the copy that all jobs run, or where the command was given.
    """

    folder: Path
    code: Path
    runs: list[Run]
    training: list[Job]
    evaluations: list[Job]
    max_parallel: int

    @property
    def name(self) -> str:
        return self.folder.parent.name

    @property
    def arrays(self) -> dict[str, str]:
        """Scripts of the sweep by file name."""
        logs, found = self.folder / "logs", {}
        for name, file, jobs in (
            (self.name, "submit.slurm", self.training),
            (f"{self.name}-eval", "evaluate.slurm", self.evaluations),
        ):
            if jobs:
                found[file] = array_text(name, jobs, logs, self.max_parallel)
        return found


def submit_sweep(args: SubmitArgs) -> int:
    """Submit it, run it here, or show it; the exit status."""
    if sys.stderr.isatty():  # for whoever waits: it takes a while
        print("reading the configs of the sweep", file=sys.stderr, flush=True)
    runs = configs.read_sweep(args)
    evaluation = configs.read_evaluation(args, runs)
    sweep = _planned(args, runs, evaluation)
    problems = _in_the_way(sweep)
    if args.dry_run:
        _show(args, sweep, problems)
        return 0
    if problems and not args.dirs_exists_ok:
        raise ConfigError(
            f"{problems[0]} exists{_and_more(problems)}: give sweep_dir=FOLDER for other places, or"
            " dirs_exists_ok=true to go on in these"
        )
    _write(args, sweep)
    stool.say(_table(sweep))
    _warn_of_data(sweep)
    if args.launcher == "bash":
        return here.run_all(sweep.training, sweep.evaluations)
    return slurm.submit_all(args.launcher, sweep.folder, bool(sweep.evaluations), len(runs))


def _planned(args: SubmitArgs, runs: list[Run], evaluation: DictConfig | None) -> Sweep:
    folder = _sweep_dir(args, runs) / FOLDER
    code = stool.fresh_code(folder) if args.copy_code else Path.cwd()
    training = [(run, replace(stool_args(args), config=run.config)) for run in runs]
    evaluations = [
        (run, replace(_evaluation_args(args), config=_evaluation_config(run, evaluation)))
        for run in (runs if evaluation is not None else ())
    ]
    for run, one in (*training, *evaluations):
        with cli.naming(run.file):
            stool.validate_args(one)
            stool.check_code(one, Path(one.config.dump_dir))
    training, evaluations = (
        [_job(*one, code) for one in _timed(x)] for x in (training, evaluations)
    )
    sweep = Sweep(folder, code, runs, training, evaluations, args.max_parallel)
    _check_places(sweep)
    return sweep


def _sweep_dir(args: SubmitArgs, runs: list[Run]) -> Path:
    """The folder that all runs lie in."""
    if args.sweep_dir is not None:
        return Path(os.path.abspath(Path(args.sweep_dir).expanduser()))
    parents = list(dict.fromkeys(run.dump_dir.parent for run in runs))
    if len(parents) > 1:
        raise ConfigError(
            f"the runs have their dump_dir in several folders ({parents[0]}, {parents[1]}): give"
            " sweep_dir=FOLDER, in which each gets a folder of its name"
        )
    return parents[0]


def _evaluation_args(args: SubmitArgs) -> StoolArgs:
    return stool_args(
        args, script=EVALUATE, nodes=1, ngpu=args.eval_ngpu or args.ngpu, time=args.eval_time
    )


def _evaluation_config(run: Run, evaluation: DictConfig) -> DictConfig:
    """The evaluation's: of a run, whose last checkpoint is not there yet."""
    places = {"ckpt_dir": str(run.dump_dir), "dump_dir": str(_evaluation_folder(run, evaluation))}
    return stool.with_absolute_paths(OmegaConf.merge(evaluation, places))


def _evaluation_folder(run: Run, evaluation: DictConfig) -> Path:
    return run.dump_dir / "evals" / evaluation.name


def _timed(jobs: list[tuple[Run, StoolArgs]]) -> list[tuple[Run, StoolArgs]]:
    """With the time limit that all have: SLURM is asked for it once."""
    limit = (stool.time_limit(jobs[0][1]) if jobs else None) or -1
    return [(run, replace(args, time=limit)) for run, args in jobs]


def _job(run: Run, args: StoolArgs, code: Path) -> Job:
    with cli.naming(run.file):
        folder = Path(args.config.dump_dir)
        return Job(run.name, folder, args.config, text_of(args, args.config, folder, code))


def _check_places(sweep: Sweep) -> None:
    for job in (*sweep.training, *sweep.evaluations):
        if job.folder == sweep.folder:
            raise ConfigError(f"name={job.name}: the folder {job.folder} is the sweep's own")
        link = job.folder / "code"
        if sweep.code != Path.cwd() and link.exists() and not link.is_symlink():
            raise ConfigError(
                f"{link} is an earlier job's copy of the code, and this one's is in {sweep.code}:"
                " move it away, or give sweep_dir=FOLDER for other places"
            )


def _in_the_way(sweep: Sweep) -> list[Path]:
    """What is there already of that which the sweep would write."""
    folders = [sweep.folder, *(run.dump_dir for run in sweep.runs)]
    return [folder for folder in folders if folder.exists()]


def _and_more(problems: list[Path]) -> str:
    return f", and {len(problems) - 1} more" if len(problems) > 1 else ""


def _write(args: SubmitArgs, sweep: Sweep) -> None:
    stool.make_folder(sweep.folder / "logs", f"the sweep's folder {sweep.folder}")
    # Before the copy: they mark the folders as those of jobs, which are not copied.
    for name, text in sweep.arrays.items():
        write_text(sweep.folder / name, text)
    for job in (*sweep.training, *sweep.evaluations):
        stool.make_folder(job.folder / "logs", f"dump_dir={job.folder}")
        write_text(job.folder / "base_config.yaml", OmegaConf.to_yaml(job.config))
        write_text(job.script, job.text)
        if args.copy_code:
            stool.link_code(job.folder / "code", sweep.code)
    if args.copy_code:
        stool.say(f"copied {stool.copy_code(sweep.code):,} files of code to {sweep.code}")
        stool.link_code(sweep.folder / "code", sweep.code)


def _show(args: SubmitArgs, sweep: Sweep, problems: list[Path]) -> None:
    arrays = [] if args.launcher == "bash" else list(sweep.arrays.items())
    shown = [(str(sweep.folder / name), text) for name, text in arrays]
    shown += [
        (str(jobs[0].script), jobs[0].text) for jobs in (sweep.training, sweep.evaluations) if jobs
    ]
    for path, text in shown:
        print(f"# {path}\n{text}")
    print(_table(sweep))
    if len(sweep.runs) > 1:
        print("dry run: the scripts of the other runs differ in name and folder alone")
    if args.copy_code:
        n = sum(1 for _ in stool.code_files(Path.cwd()))
        print(f"dry run: {n:,} files of code would be copied to {sweep.code}")
    if problems and not args.dirs_exists_ok:
        print(
            f"dry run: {problems[0]} exists{_and_more(problems)}: without dirs_exists_ok=true this"
            " would be refused"
        )
    print("dry run: nothing was written, nothing submitted")
    _warn_of_data(sweep)


def _table(sweep: Sweep) -> str:
    """A line a run."""
    rows = [("", "run", "model", "steps", "folder", "config")]
    rows += [
        (str(n), run.name, run.kind, f"{run.args.steps:,}", _short(run.dump_dir), str(run.file))
        for n, run in enumerate(sweep.runs)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _warn_of_data(sweep: Sweep) -> None:
    """Data may lie where the jobs run and not here; a job that finds none ends at once."""
    missing = [folder for run in sweep.runs for folder in configs.missing_data(run)]
    for folder in dict.fromkeys(missing):
        print(
            f"warning: {folder} is not on this machine: jobs that do not find it where they run"
            " will fail",
            file=sys.stderr,
        )
