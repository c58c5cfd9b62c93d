"""Submit a program as a SLURM job, from a copy of the code as it is now.

    python -m lingua.stool script=apps.main.train config=FILE nodes=1 partition=... [key=value ...]

Writes into the config's dump_dir: code.N/ (the .py files under the working directory; N is new
each time, so that the code under a job never changes, and code is a link to the newest),
base_config.yaml, submit.slurm and logs/; then runs `<launcher> submit.slurm`. The job starts in
code.N/, so every path of the config that this module knows is made absolute before.

mem is a node's. Empty, the job asks for all of it, and where SLURM counts memory nobody shares the
node: a job that does not use all GPUs wants a number, as mem=64G.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ._files import write_whole
from ._sbatch import Job, has_command, job_text, partition_limits
from .args import dataclass_from_dict
from .errors import ConfigError, UserError

# Keys of the configs that hold paths.
PATH_KEYS = (
    "dump_dir",
    "ckpt_dir",
    "metric_log_dir",
    "data.root_dir",
    "data.tokenizer.path",
    "checkpoint.path",
    "checkpoint.init_ckpt_path",
    "validation.root_dir",
    "eval.validation.root_dir",
)
# Keys of the command line that are text, whatever YAML would read in them.
TEXT_KEYS = ("account", "constraint", "exclude", "partition", "qos")
# What tells a folder of installed packages, or of an earlier job's code, from code to copy.
ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta", "submit.slurm")
_SBATCH_OWN = re.compile(r"[\"'%\\#]")
LEAST_TIME = 5  # minutes, within which a program can start before it is warned
DEFAULT_TIME = 3 * 24 * 60  # minutes, for a partition that sinfo does not list


@dataclass
class StoolArgs:
    config: Any = None  # a path on the command line, the config itself in Python
    launcher: str = "sbatch"  # bash runs it here: within an allocation, or without SLURM
    script: str = "apps.main.train"  # the module to run
    copy_code: bool = True  # run a copy, so that a queued job does not see later changes
    dirs_exists_ok: bool = False  # go on where dump_dir exists, with new code and config
    override: bool = False  # delete dump_dir first, after a question
    nodes: int = -1
    ngpu: int = 8  # a node; as many processes
    ncpu: int = 16  # a GPU
    mem: str = ""  # a node; empty: all of it
    anaconda: str = "default"  # the environment's folder; default: of the Python that runs this
    constraint: str = ""
    exclude: str = ""
    time: int = -1  # minutes; -1: as much as the partition allows
    account: str = ""
    qos: str = ""
    partition: str = "learn"
    stdout: bool = False  # all processes write to the job's own output
    dry_run: bool = False  # print submit.slurm and what would be copied; write nothing


def copy_dir(input_dir: str | Path, output_dir: str | Path) -> int:
    """Copy the .py files under `input_dir` to the same places under `output_dir`; how many."""
    copied = 0
    for path in code_files(Path(input_dir)):
        target = Path(output_dir, path.relative_to(input_dir))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        copied += 1
    return copied


def code_files(root: Path) -> Iterator[Path]:
    """The .py files under `root`, links followed, in a fixed order.

    Hidden folders, environments and the folders of runs are left out: one that lies within the
    checkout would be copied with all its packages, or with the copies of earlier jobs.
    """
    for folder, inner, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in map(os.path.realpath, _between(root, folder)):  # a link to a folder around it
            inner.clear()
            continue
        inner[:] = sorted(name for name in inner if _is_code(Path(folder, name)))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py") and path.is_file():
                yield path


def _between(root: Path, folder: str) -> list[Path]:
    """The folders that lie around `folder`, from `root` on, by the way that led to it."""
    steps = Path(folder).relative_to(root).parts
    return [Path(root, *steps[:n]) for n in range(len(steps))]


def _is_code(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name == "__pycache__":
        return False
    return not any((folder / mark).exists() for mark in ENVIRONMENT_MARKS)


def retrieve_max_time_per_partition() -> dict[str, int]:
    """Minutes by partition, as sinfo tells. ConfigError where there is no SLURM to ask."""
    return partition_limits()


def validate_args(args: StoolArgs) -> None:
    """Fill in what follows from other fields; ConfigError for what cannot be submitted."""
    config = args.config
    if not config or not config.get("dump_dir") or not config.get("name"):
        raise ConfigError("config needs dump_dir and name: the job's folder and its name in SLURM")
    for name, least in (("nodes", 1), ("ngpu", 1), ("ncpu", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"{name}={getattr(args, name)} is too small: give at least {least}")
    if args.time == 0 or args.time < -1:
        raise ConfigError(f"time={args.time} is not allowed: give minutes, or -1 for all there is")
    if 0 < args.time < LEAST_TIME and is_sbatch(args.launcher):
        raise ConfigError(
            f"time={args.time} is too short: SLURM warns the program, which saves and ends then, up"
            f" to three minutes before the end; give at least {LEAST_TIME}"
        )
    texts = {field.name: getattr(args, field.name) for field in fields(args)}
    texts.update(name=config["name"], dump_dir=config["dump_dir"])
    texts["the working directory"] = os.getcwd()
    del texts["launcher"]  # which is not in the script
    for name, value in texts.items():
        if isinstance(value, str) and (not value.isprintable() or _SBATCH_OWN.search(value)):
            raise ConfigError(
                f"{name}={value!r} has a character that sbatch reads as its own (quotes, %, # and"
                " backslashes, those that cannot be printed): it goes into the script; change it"
            )
    for key in ("name", "dump_dir"):
        value = str(config[key])
        if not isinstance(config[key], str):
            raise ConfigError(f"{key}={value} is not text: write it in quotes")
    if not re.fullmatch(r"\w+(\.\w+)*", args.script):
        raise ConfigError(f"script={args.script!r} is no module: write it as apps.main.train")
    if not args.partition:
        raise ConfigError("partition='' is empty: give one of those that sinfo lists")
    args.mem = args.mem or "0"
    if args.anaconda != "default" and not Path(args.anaconda, "bin", "python").is_file():
        raise ConfigError(f"anaconda={args.anaconda} has no bin/python: give an environment")
    if not args.launcher.split() or not (args.dry_run or has_command(args.launcher.split()[0])):
        raise ConfigError(
            f"launcher={args.launcher!r} is not installed here: on a machine without SLURM use"
            " launcher=bash, or look at the job with dry_run=true"
        )
    home = os.environ.get("LINGUA_HOME")
    if home and not Path(home, "lingua").is_dir():
        raise ConfigError(
            f"LINGUA_HOME={home!r} is no checkout of Lingua, and the job would look there: correct"
            " it, or unset it"
        )
    if args.nodes > 1 and not has_srun(args):
        raise ConfigError(f"nodes={args.nodes} needs srun, which is not here: give nodes=1")


def is_sbatch(launcher: str) -> bool:
    """Whether SLURM reads the script's options; sbatch may have more of its own."""
    return Path(launcher.partition(" ")[0]).name == "sbatch"


def has_srun(args: StoolArgs) -> bool:
    """Whether the job is started by srun: wherever SLURM is, and in what is only looked at."""
    if args.launcher != "bash":
        return True
    return has_command("srun") and "SLURM_JOB_ID" in os.environ  # within an allocation


def script_text(args: StoolArgs, config: DictConfig, dump_dir: Path, code: Path) -> str:
    """submit.slurm of a job that runs `config` in `dump_dir` by the program in `code`."""
    return job_text(make_job(args, config, dump_dir, code), has_srun=has_srun(args))


def start(launcher: list[str], script: Path) -> int:
    """Hand a job's script to the launcher; its exit status."""
    say(f"{' '.join(launcher)} {script}")
    status = run_launcher([*launcher, str(script)])
    if status:
        print(
            f"{' '.join(launcher)} ended with status {status}, and dump_dir={script.parent} stays"
            " as it is: once that is mended, give the same command with dirs_exists_ok=true",
            file=sys.stderr,
        )
    return status


def launch_job(args: StoolArgs) -> int:
    """Write the job's folder and hand it to the launcher, whose exit status is returned."""
    return launch(args, script_text, start)


def launch(
    args: StoolArgs, text_of: Callable[..., str], start: Callable[[list[str], Path], int]
) -> int:
    """The same, where others write submit.slurm and submit it: as `script_text` and `start`."""
    validate_args(args)
    config = with_absolute_paths(args.config)
    dump_dir = Path(config["dump_dir"])
    code = fresh_code(dump_dir) if args.copy_code else Path.cwd()
    check_code(args, dump_dir)
    text = text_of(args, config, dump_dir, code)
    if args.dry_run:
        _show(args, dump_dir, code, text)
        return 0
    if not make_room(args, dump_dir):
        return 1
    make_folder(dump_dir / "logs", f"dump_dir={dump_dir}")
    write_whole(dump_dir / "base_config.yaml", OmegaConf.to_yaml(config))
    script = dump_dir / "submit.slurm"
    write_whole(script, text)  # before the copy: it marks the folder as one that is not copied
    if args.copy_code:
        say(f"copied {copy_code(code):,} files of code to {code}")
        link_code(dump_dir / "code", code)
    return start(args.launcher.split(), script)


def say(text: str) -> None:
    """Print it; a job is submitted also where nobody reads on, as behind `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_folder(folder: Path, field: str) -> None:
    """ConfigError where a file is in the way; field: by which the user gave the place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{field} cannot be made: {error.filename} is not, or is not in, a folder: give another"
        ) from None


def fresh_code(folder: Path) -> Path:
    """Where the next copy of the code goes: code.N, which no job has seen yet."""
    taken = [int(one.suffix[1:]) for one in folder.glob("code.*") if one.suffix[1:].isdecimal()]
    return folder / f"code.{max(taken, default=0) + 1}"


def copy_code(code: Path) -> int:
    """The code under the working directory, with its commit; how many files."""
    copied = copy_dir(Path.cwd(), code)
    write_whole(code / ".commit", f"{commit_here()}\n")
    return copied


def link_code(link: Path, code: Path) -> None:
    """`link` becomes one to `code`, at once.

    A folder there is the copy of a stool that does not number them, and jobs may be at work in it.
    """
    if link.is_dir() and not link.is_symlink():
        return
    partial = link.with_name(f".code.{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(code)
    os.replace(partial, link)


def run_launcher(command: list[str]) -> int:
    """Run it to its end; its exit status.

    Ctrl-C reaches the programs that it started as well, which save before they end: they are
    waited for, where `subprocess.call` kills.
    """
    process, interrupted = subprocess.Popen(command), False
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return status


def with_absolute_paths(config: Any) -> DictConfig:
    """A copy of a config in which every path that this module knows is absolute."""
    config = OmegaConf.create(
        config if isinstance(config, dict) else OmegaConf.to_container(config)
    )
    for key in PATH_KEYS:
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
        if value and not isinstance(value, str):
            raise ConfigError(f"{key}={value} is no path: write it as text, in quotes")
        if value:
            OmegaConf.update(config, key, os.path.abspath(os.path.expanduser(value)))
    return config


def check_code(args: StoolArgs, dump_dir: Path) -> None:
    """ConfigError where the job would not find its program, or would copy what is no code."""
    here = Path.cwd()
    if dump_dir == here or dump_dir in here.parents:
        raise ConfigError(f"dump_dir={dump_dir} holds the code that would be copied: give another")
    if not args.copy_code:
        return
    path = Path(*args.script.split("."))
    if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
        raise ConfigError(
            f"script={args.script} is not in {here}, whose code would be copied: run this from the"
            " folder that holds it, or give copy_code=false for a module that is installed"
        )


def make_job(args: StoolArgs, config: DictConfig, dump_dir: Path, code: Path) -> Job:
    """What the script of a job is written from."""
    if args.anaconda == "default":
        python = Path(sys.executable)
    else:
        python = Path(args.anaconda).expanduser().absolute() / "bin" / "python"
    named = ("exclude", "qos", "account", "constraint")
    return Job(
        name=config["name"], dump_dir=dump_dir, script=args.script,
        nodes=args.nodes, ngpu=args.ngpu, ncpu=args.ncpu, mem=args.mem,
        time=time_limit(args), partition=args.partition,
        directives=[f"--{name}={getattr(args, name)}" for name in named if getattr(args, name)],
        python=python, code=code, origin=_origin(args), submitted_from=Path.cwd(),
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith("LINGUA_")},
        stdout=args.stdout, within_allocation=args.launcher == "bash",
    )  # fmt: skip


def time_limit(args: StoolArgs) -> int | None:
    """Minutes; None where no SLURM will read them."""
    if args.time > 0:
        return args.time
    if not is_sbatch(args.launcher):
        return None
    try:
        limits = retrieve_max_time_per_partition()
        # Of several the job starts in the first that is free, which has to allow it.
        names = args.partition.split(",")
        return min((limits[name] for name in names if name in limits), default=DEFAULT_TIME)
    except ConfigError:
        if args.dry_run:  # to look at, no SLURM is needed
            return None
        raise


def commit_here() -> str:
    """Of the working directory, marked when files differ from it; empty outside git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""


def _origin(args: StoolArgs) -> str:
    commit = f"commit {commit_here() or 'unknown'}"
    return f"copied from {Path.cwd()}, {commit}" if args.copy_code else commit


def _show(args: StoolArgs, dump_dir: Path, code: Path, text: str) -> None:
    print(text)
    if args.copy_code:
        number = sum(1 for _ in code_files(Path.cwd()))
        print(f"dry run: {number:,} files of code would be copied to {code}")
    if dump_dir.exists() and not (args.dirs_exists_ok or args.override):
        print(f"dry run: {dump_dir} exists: without dirs_exists_ok=true this would be refused")
    print("dry run: nothing was written, nothing submitted")


def make_room(args: StoolArgs, dump_dir: Path) -> bool:
    """Whether the job may have `dump_dir`; what is in it is deleted only after a yes."""
    if not dump_dir.exists():
        return True
    if args.override:
        question = f"Delete {dump_dir} with all that is in it? It cannot be undone. (yes/no): "
        if not sys.stdin.isatty():
            raise ConfigError(
                f"override=true would delete {dump_dir}, and there is nobody to ask: delete it"
                " yourself, or give dirs_exists_ok=true to keep what is in it"
            )
        if _answer(question) != "yes":
            print("nothing was deleted, nothing submitted")
            return False
        shutil.rmtree(dump_dir)
        return True
    if args.dirs_exists_ok:
        return True
    raise ConfigError(
        f"dump_dir={dump_dir} exists: give another, or dirs_exists_ok=true to go on in it"
    )


def _answer(question: str) -> str:
    try:
        return input(question).strip().lower()
    except EOFError:
        return ""


def main() -> None:
    """The command line: key=value of StoolArgs, config a YAML file."""
    try:
        sys.exit(launch_job(_read_args()))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        print(f"error: dump_dir cannot be written: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())


def as_written(words: DictConfig, argv: list[str]) -> None:
    """Undo what YAML makes of key=value: 2:00:00 is the number 7200 to it, and 0123 is 83."""
    given = dict(word.partition("=")[::2] for word in argv)  # of several the last one counts
    for key, value in given.items():
        if key in TEXT_KEYS and not isinstance(words[key], str) and value != "null":
            words[key] = value
        if key in ("time", "eval_time") and ":" in value:
            raise ConfigError(f"{key}={value} is no number: give minutes, as {key}=120")


def _read_args() -> StoolArgs:
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print(f"{__doc__}\n{OmegaConf.to_yaml(OmegaConf.structured(StoolArgs()))}")
        sys.exit(0)
    path = "the command line"
    try:
        words = OmegaConf.from_cli()
        as_written(words, sys.argv[1:])
        path = words.pop("config", None)
        if not path or not os.path.isfile(str(path)):
            raise ConfigError(f"config={path} is not a file: give the path of a YAML file")
        args = dataclass_from_dict(StoolArgs, OmegaConf.to_container(words))
        args.config = OmegaConf.load(path)
        if not isinstance(args.config, DictConfig):
            raise ConfigError(f"config={path} holds no mapping: write one `key: value` a line")
        OmegaConf.resolve(args.config)
        return args
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeError) as error:
        reason = f"{getattr(error, 'full_key', None) or path}: {str(error).splitlines()[0]}"
        raise ConfigError(f"{reason}; --help lists what is allowed") from None


if __name__ == "__main__":
    main()
