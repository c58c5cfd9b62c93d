"""The text of a SLURM job, and what is asked of SLURM to write it."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

UNLIMITED = 14 * 24 * 60  # minutes, for a partition without a limit
# A shell by `srun --pty` has the CPUs of its step in its environment. sbatch hands that on, and a
# srun that is told of CPUs which its own job does not have ends at once.
FORGET_BINDING = "unset ${!SLURM_CPU_BIND*} ${!SLURM_MEM_BIND*}"
# Options of srun, as variables. By bash within an allocation it may be in a step that has all the
# CPUs, for which it would wait; Ctrl-C is for the tasks, not for the state of srun; and a second
# start is the same job, whose output the first has in the same files.
WITHIN_ALLOCATION = "export SLURM_OVERLAP=1 SLURM_DISABLE_STATUS=1 SLURM_OPEN_MODE=append"


@dataclass(frozen=True)
class Job:
    """What submit.slurm is written from.

    Attributes:
        time: minutes; None leaves the limit to the partition.
        directives: further options of sbatch, without the `#SBATCH `.
        python: the interpreter, an absolute path.
        code: the folder that the programs are imported from.
        origin: where that code comes from, for the reader.
        submitted_from: what relative paths of the config are relative to.
        environment: variables that the job has to have.
        processes: those of all nodes.
        stdout: all processes write to the job's own output.
        within_allocation: bash runs the script in a job that is there already.
    """

    name: str
    dump_dir: Path
    script: str
    nodes: int
    ngpu: int
    ncpu: int
    mem: str
    time: int | None
    partition: str
    directives: list[str]
    python: Path
    code: Path
    origin: str
    submitted_from: Path
    environment: dict[str, str]
    stdout: bool
    within_allocation: bool

    @property
    def processes(self) -> int:
        return self.nodes * self.ngpu


def job_text(job: Job, has_srun: bool = True) -> str:
    """submit.slurm; without srun it is a script for this machine alone, by torchrun.

    The output of the job itself lies right in logs/, which exists when the job is submitted:
    SLURM may not make the folder of a file that it is told to write.
    """
    logs = job.dump_dir / "logs"
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--gres=gpu:{job.ngpu}",
        f"--cpus-per-gpu={job.ncpu}",
        *([f"--time={job.time}"] if job.time else []),
        f"--partition={job.partition}",
        f"--mem={job.mem}",
        *job.directives,
        f"--output={logs}/%j.stdout",
        f"--error={logs}/%j.stderr",
        "--open-mode=append",
        "--requeue",  # allowed, whatever the cluster's JobRequeue says
        "--signal=USR2@120",
        "--distribution=block",
    ]
    start = _by_srun(job) if has_srun else _by_torchrun(job)
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {_directive(option)}" for option in options),
        "",
        f"# Runs the code in {job.code}",
        f"# {job.origin}",
        *_activation(job.python),
        "export OMP_NUM_THREADS=1",
        "export LAUNCH_WITH=SBATCH",
        f"export DUMP_DIR={shlex.quote(str(job.dump_dir))}",
        *(f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()),
        # The program finds the first of these folders in OLDPWD.
        f"cd {shlex.quote(str(job.submitted_from))}",
        f"cd {shlex.quote(str(job.code))} || exit 1",
        *start,
    ]
    return "\n".join(lines) + "\n"


def _directive(option: str) -> str:
    """sbatch splits a directive at blanks, but for those within quotes."""
    name, _, value = option.partition("=")
    return f'{name}="{value}"' if re.search(r"\s", value) else option


def _command(job: Job, *launcher: str) -> str:
    words = [*launcher, "-m", job.script, f"config={job.dump_dir / 'base_config.yaml'}"]
    return shlex.join(words)


def _by_srun(job: Job) -> list[str]:
    words = ["srun", "--kill-on-bad-exit=1", "-n", str(job.processes), "-N", str(job.nodes)]
    if not job.stdout:
        logs = job.dump_dir / "logs" / "%j"
        words += ["-o", f"{logs}_%t.out", "-e", f"{logs}_%t.err"]
    return [*before_srun(job.within_allocation), _command(job, *words, str(job.python), "-u")]


def before_srun(within_allocation: bool) -> list[str]:
    """What srun has to find in its environment, or not to find there."""
    return [FORGET_BINDING, *([WITHIN_ALLOCATION] if within_allocation else [])]


def _by_torchrun(job: Job) -> list[str]:
    # torchrun waits for a last save after SIGTERM, 30 seconds if it is not told otherwise.
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ngpu}"]
    return [
        "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600",
        _command(job, "exec", str(job.python), "-u", *torchrun),
    ]


def _activation(python: Path) -> list[str]:
    """The environment of `python`, whichever tool made it."""
    prefix = python.parent.parent
    quoted = shlex.quote(str(prefix))
    if (prefix / "conda-meta").is_dir():
        conda = shlex.quote(os.environ.get("CONDA_EXE", "conda"))
        # What `conda init` does for a shell, which scripts do not have.
        return [f'eval "$({conda} shell.bash hook)"', f"conda activate {quoted}"]
    if (prefix / "bin" / "activate").is_file():
        return [f"source {quoted}/bin/activate"]
    return [f'export PATH={shlex.quote(str(python.parent))}:"$PATH"']


def has_command(name: str) -> bool:
    return shutil.which(name) is not None


def partition_limits() -> dict[str, int]:
    """The time limit of every partition in minutes, as sinfo tells. ConfigError without sinfo."""
    try:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--format=%R %l"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"time=-1 asks SLURM for the partition's limit, and sinfo does not answer ({error}):"
            " give time in minutes"
        ) from None
    pairs = [line.split() for line in answer.stdout.splitlines() if len(line.split()) == 2]
    return {name: _minutes(limit) for name, limit in pairs}


def _minutes(limit: str) -> int:
    """SLURM's days-hours:minutes:seconds, of which it leaves out from the left."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return UNLIMITED
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + (seconds > 0)
