"""The scripts of jobs, as the host's stool writes them, and those that make arrays of them."""

import contextlib
import importlib
import io
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from apps.topk import lingua_host
from lingua_topk import host
from lingua_topk._host.lingua import stool
from lingua_topk._host.lingua._sbatch import before_srun
from lingua_topk._host.lingua.stool import StoolArgs
from lingua_topk.errors import ConfigError, HostError

# Directives that an array has of its own.
OWN = ("job-name", "output", "error")


def text_of(args: StoolArgs, config: DictConfig, dump_dir: Path, code: Path) -> str:
    """submit.slurm of one job, by Lingua's own stool where a checkout of it is the host.

    As `stool.script_text`. Where there is no srun it is always ours, by torchrun.
    """
    if lingua_host.is_lingua() and stool.has_srun(args):
        return _text_of_lingua(args, config, dump_dir, code)
    return stool.script_text(args, config, dump_dir, code)


def _text_of_lingua(args: StoolArgs, config: DictConfig, dump_dir: Path, code: Path) -> str:
    """What the checkout's stool writes; it is given a folder that is only for that.

    It takes paths as they are and does not quote them, copies everything that ends in .py,
    environments and earlier copies included, asks `sinfo --json`, which not every SLURM has, and
    drops the launcher's status: so it only writes here.
    """
    if not re.fullmatch(r"[\w@%+=:,./-]+", f"{dump_dir}{config.name}"):
        raise ConfigError(
            f"dump_dir={dump_dir} or name={config.name} has a blank or a character of the shell's,"
            " which the stool of Meta Lingua does not quote: change it, or set"
            f" {host.HOST_VARIABLE}=embedded"
        )
    lingua_stool = importlib.import_module("lingua.stool")
    python = stool.make_job(args, config, dump_dir, dump_dir).python
    with tempfile.TemporaryDirectory() as folder, _writing_only(lingua_stool):
        asked = replace(
            args, config=OmegaConf.merge(config, {"dump_dir": folder}), launcher="true",
            dirs_exists_ok=True, override=False, anaconda=str(python.parent.parent),
            time=stool.time_limit(args) or stool.DEFAULT_TIME,
        )  # fmt: skip
        known = {one.name for one in fields(lingua_stool.StoolArgs)}
        given = {one.name: getattr(asked, one.name) for one in fields(StoolArgs)}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                lingua_stool.launch_job(
                    lingua_stool.StoolArgs(**{k: v for k, v in given.items() if k in known})
                )
        except AssertionError as error:
            raise HostError(f"the stool of {host.bound().describe()} refuses ({error})") from None
        text = Path(folder, "submit.slurm").read_text(encoding="utf-8")
    # SLURM makes no folders: a job whose logs/%j is not there fails, a step's output is lost.
    text = text.replace(folder, str(dump_dir)).replace("/logs/%j/%j", "/logs/%j")
    # The copy that never changes, where Lingua's is replaced under the job.
    text = text.replace(f"\ncd {dump_dir}/code/", f"\ncd {code}/", 1)
    before = "\n".join(before_srun(args.launcher == "bash"))
    text = text.replace("\nsrun ", f"\n{before}\nsrun ", 1)
    # Not every cluster allows it where the job does not say so.
    return text.replace("\n#SBATCH --open-mode", "\n#SBATCH --requeue\n#SBATCH --open-mode", 1)


@contextlib.contextmanager
def _writing_only(lingua_stool):
    """Within it Lingua's stool copies nothing; put back on exit."""
    name = "copy_dir"
    if not hasattr(lingua_stool, name):
        raise HostError(
            f"lingua.stool of this host has no {name}, which apps.topk.submit replaces: use"
            " facebookresearch/lingua at 437d680, or LINGUA_TOPK_HOST=embedded"
        )
    original = getattr(lingua_stool, name)
    setattr(lingua_stool, name, lambda *folders: None)
    try:
        yield
    finally:
        setattr(lingua_stool, name, original)


@dataclass(frozen=True)
class Job:
    """One job: its folder, its name in tables, and its script there."""

    name: str
    folder: Path
    config: DictConfig
    text: str

    @property
    def script(self) -> Path:
        return self.folder / "submit.slurm"


def array_text(name: str, jobs: Sequence[Job], logs: Path, max_parallel: int) -> str:
    """The script of a job array whose element N runs the script of job N.

    Its directives are those of the first job: all have the same but for name and folder. Each
    job's script is one by itself, and runs that job again where it is submitted alone.
    """
    directives = [
        line for line in jobs[0].text.splitlines()
        if line.startswith("#SBATCH ") and not re.match(rf"#SBATCH +--({'|'.join(OWN)})=", line)
    ]  # fmt: skip
    at_a_time = f"%{max_parallel}" if max_parallel else ""
    lines = [
        "#!/bin/bash",
        *directives,
        f'#SBATCH --job-name="{name}"',
        f"#SBATCH --array=0-{len(jobs) - 1}{at_a_time}",
        f'#SBATCH --output="{logs}/%A_%a.stdout"',
        f'#SBATCH --error="{logs}/%A_%a.stderr"',
        "",
        "jobs=(",
        *(f"  {shlex.quote(str(job.folder))}  # {n}" for n, job in enumerate(jobs)),
        ")",
        'exec bash "${jobs[$SLURM_ARRAY_TASK_ID]}/submit.slurm"',
    ]
    return "\n".join(lines) + "\n"
