"""A tiny run as a job of a real SLURM, submitted by the real command."""

import os
import re
import signal
import sys
from pathlib import Path

from omegaconf import OmegaConf

from tests.apps.tiny import CONFIG, write_corpus
from tests.cluster.slurm import ENDED, PARTITION

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
JOB = f"""
name: tiny
steps: {STEPS}
data: {{root_dir: .}}
checkpoint: {{dump: {{every: 1000}}}}
"""


def lay_out(root: Path, *names: str) -> Path:
    """What jobs are submitted from: a corpus, and links to our folders."""
    write_corpus(root)
    for name in ("apps", "lingua_topk", *names):
        (root / name).symlink_to(ROOT / name)
    return root


def write_config(project: Path, name: str, *overrides: str) -> Path:
    """project/NAME.yaml, of a run in runs/NAME."""
    config = OmegaConf.merge(
        OmegaConf.create(CONFIG),
        OmegaConf.create(JOB),
        OmegaConf.from_dotlist([f"dump_dir=runs/{name}", *overrides]),
    )
    OmegaConf.save(config, project / f"{name}.yaml")
    return project / f"{name}.yaml"


class Submitted:
    """A run that stool made a job of."""

    def __init__(self, cluster, folder, job):
        self.cluster, self.folder, self.job = cluster, folder, job

    def steps(self):
        """Those done so far, as metrics.jsonl has them."""
        path = self.folder / "metrics.jsonl"
        return path.read_text("utf-8").count("\n") if path.exists() else 0

    def checkpoints(self):
        return sorted(int(path.name) for path in (self.folder / "checkpoints").iterdir())

    def log(self, name):
        return (self.folder / "logs" / f"{self.job}{name}").read_text(encoding="utf-8")

    def hold(self, after):
        """Stop the tasks in the middle of the run, once it has done more than so many steps."""
        self.cluster.wait_until(lambda: self._goes_on(after), f"more steps than {after}")
        self.signal(signal.SIGSTOP)
        assert self.steps() < STEPS

    def _goes_on(self, after):
        assert self.cluster.state(self.job) in ("PENDING", "RUNNING"), self.log("_0.err")[-3000:]
        return self.steps() > after

    def signal(self, number):
        for pid in self.cluster.tasks(self.job).values():
            os.kill(pid, number)

    def put_off_when_requeued(self):
        """Until `again`, and with time enough: SLURM would start it in two minutes, and warn it."""
        self.cluster.wait(self.job, {"PENDING"})
        self.cluster.update(self.job, TimeLimit=60, StartTime="now+1day")

    def again(self):
        """Have the requeued job start now; SLURM would wait."""
        self.cluster.wait(self.job, {"PENDING"})
        self.cluster.update(self.job, StartTime="now")

    def has_ended(self):
        return self.cluster.state(self.job) in ENDED

    def ends(self):
        """What SLURM says of the job once it has ended."""
        return self.cluster.wait(self.job)


def submit(cluster, project, name, *words, script="apps.topk.train", overrides=()):
    """The run whose config `write_config` writes; words: of stool."""
    write_config(project, name, *overrides)
    command = [
        sys.executable, "-m", "lingua.stool", f"script={script}", f"config={name}.yaml", "nodes=1",
        f"partition={PARTITION}", "ncpu=4", *words,
    ]  # fmt: skip
    done = cluster.run(*command, cwd=project)
    assert done.returncode == 0, done.stderr
    job = re.fullmatch(r"Submitted batch job (\d+)", done.stdout.splitlines()[-1])[1]
    return Submitted(cluster, project / "runs" / name, job)
