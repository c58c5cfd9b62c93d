"""A real SLURM of one node, on loopback, in a folder of its own.

    python -m tests.cluster.slurm

starts one, prints what makes another shell use it (there: submit ... partition=loopback ngpu=1),
and stops it at Ctrl-C, or at SIGTERM where it is in the background. It has its own configuration,
key, state and ports, so it neither needs nor disturbs another SLURM of the machine. From Debian's
packages slurm-wlm and munge, and as root: slurmd runs jobs as the users they are of.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
PARTITION = "loopback"
SECONDS = 600  # after which something hangs
# What has ended, as against what waits, runs or is being taken down.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# The first number is chosen by chance: where two tasks meet follows from the number of their job,
# and several such clusters may run on one machine. cred_expire is also how long a requeued job
# waits. Memory is not counted, CPUs are made up, and so are GPUs: a count without files is taken
# back by slurmd, which looks for the devices.
CONF = """\
ClusterName=loopback
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=120
CommunicationParameters=NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=0
OverTimeLimit=60
MinJobAge=86400
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=256 RealMemory=1000 Gres=gpu:16 State=UNKNOWN
PartitionName={partition} Nodes=ALL Default=YES MaxTime=7-00:00:00 State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here, and how to get one; empty where there can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    names = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if names:
        return f"no {', '.join(names)} here: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root: run the tests as root"


class Cluster:
    """`start` and `stop` it; between them, `run` SLURM's commands and ask about jobs."""

    def __init__(self):
        # Sockets lie in it, whose paths may not be long.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.conf = self.folder / "slurm.conf"
        self._daemons: list[subprocess.Popen] = []
        # Should this process be killed, its end of the pipe is closed, and that one clears up.
        self._heir = subprocess.Popen(
            [sys.executable, __file__, self.folder], env=self.environment(SLURM_CONF=""),
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def start(self) -> None:
        self._write_files()
        munge = self.folder / "munge"
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={munge}/socket",
            f"--key-file={munge}/key", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
            f"--log-file={munge}/log",
        )  # fmt: skip
        self._until((munge / "socket").exists, "munged's socket")
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        self._until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T").stdout, "an idle node")

    def stop(self) -> None:
        """End the jobs, the daemons and whatever they left, and delete the folder."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=20)
        self._heir.communicate()

    def environment(self, **variables: str) -> dict[str, str]:
        """For processes that are to use this SLURM: of this process, naming no other job."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        # Two tasks may not share a GPU, of which the machine may have one.
        ours = {"SLURM_CONF": str(self.conf), "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
        return {**clean, **ours, "OMP_NUM_THREADS": "1", **variables}

    def run(self, *words: object, **options) -> subprocess.CompletedProcess:
        """A command of SLURM, or one that uses it, to its end."""
        options = {"env": self.environment(), "timeout": SECONDS, **options}
        return subprocess.run(
            list(map(str, words)), capture_output=True, text=True, stdin=subprocess.DEVNULL,
            **options,
        )  # fmt: skip

    def submit(self, *words: object, **options) -> str:
        """The number of the job that `sbatch words` gives."""
        done = self.run("sbatch", "--parsable", *words, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts, TimeLimit, StdOut ..."""
        text = self.run("scontrol", "show", "job", "-o", job).stdout
        return dict(re.findall(r"(\w[\w/:]*)=(\S*)", text))

    def state(self, job: str) -> str:
        """JobState, or an empty string of a job that is not known."""
        return self.show(job).get("JobState", "")

    def update(self, job: str, **values: object) -> None:
        words = [f"{name}={value}" for name, value in values.items()]
        done = self.run("scontrol", "update", f"JobId={job}", *words)
        assert done.returncode == 0, done.stderr

    def wait(self, job: str, states: Iterable[str] = ENDED) -> dict[str, str]:
        """What `show` says of the job once it is in one of the states, or has ended otherwise."""
        wanted = set(states)
        self._until(lambda: self.state(job) in wanted | ENDED, f"job {job} to be {wanted}")
        shown = self.show(job)
        assert shown["JobState"] in wanted, f"job {job} is {shown['JobState']}, not {wanted}"
        return shown

    def wait_until(self, is_true: Callable[[], object], what: str = "") -> None:
        self._until(is_true, what or getattr(is_true, "__name__", "something"))

    def tasks(self, job: str) -> dict[int, int]:
        """The process of each task of a running job, by rank."""
        found = {}
        for pid, variables in _processes(self.folder):
            # A process that a task starts has its variables too.
            if variables.get("SLURM_JOB_ID") == job and variables.get("SLURM_TASK_PID") == str(pid):
                found[int(variables["SLURM_PROCID"])] = pid
        return found

    def processes(self) -> list[int]:
        """All that the daemons and jobs of this SLURM started, and they themselves."""
        return [pid for pid, _ in _processes(self.folder)]

    def logs(self) -> str:
        """The end of what the daemons wrote."""
        files = [*(self.folder / "log").iterdir(), self.folder / "munge" / "log"]
        return "\n".join(
            f"{path}:\n" + path.read_text("utf-8", errors="replace")[-3000:]
            for path in files if path.is_file()
        )  # fmt: skip

    def _write_files(self) -> None:
        for name in ("state", "spool", "log", "munge"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname().partition(".")[0]
        controller, node = _free_ports(2)
        text = CONF.format(
            host=host, controller=controller, node=node, folder=self.folder, partition=PARTITION,
            first=random.randrange(1, 1_000_000),
        )  # fmt: skip
        self.conf.write_text(text, encoding="utf-8")
        gpus = self.folder / "gpu"
        for number in range(16):
            Path(f"{gpus}{number}").touch()
        text = f"NodeName={host} Name=gpu File={gpus}[0-15]\n"
        (self.folder / "gres.conf").write_text(text, encoding="utf-8")

    def _daemon(self, *words: str) -> None:
        # Should this process be killed, they go too.
        words = ("setpriv", "--pdeathsig", "TERM", *words)
        with (self.folder / "log" / words[3]).open("a", encoding="utf-8") as log:
            self._daemons.append(
                subprocess.Popen(
                    words, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log, start_new_session=True,
                )
            )  # fmt: skip

    def _until(self, is_true: Callable[[], object], what: str) -> None:
        until = time.monotonic() + SECONDS
        while not is_true():
            ended = [d.args[3] for d in self._daemons if d.poll() is not None]
            if ended or time.monotonic() > until:
                why = f"{ended} ended" if ended else f"waited {SECONDS} s"
                raise RuntimeError(f"SLURM: {why}, for {what}\n{self.logs()}")
            time.sleep(0.2)


def _processes(folder: Path) -> Iterable[tuple[int, dict[str, str]]]:
    """What runs by the configuration in a folder, and its environment."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            items = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        variables = dict(item.partition("=")[::2] for item in items)
        if variables.get("SLURM_CONF") == str(folder / "slurm.conf"):
            yield int(process.name), variables


def _clear_up(folder: Path) -> None:
    """Once nothing more comes by the pipe: end what is left, and delete the folder."""
    sys.stdin.read()
    for _ in range(10):  # one may just be starting another
        for pid, _ in _processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running():
    """A SLURM that runs within, and is gone afterwards, whatever happens."""
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main() -> None:
    if len(sys.argv) == 2:
        return _clear_up(Path(sys.argv[1]))
    if missing():
        sys.exit(f"error: {missing()}")
    with running() as cluster:
        print(f"export SLURM_CONF={cluster.conf}  # partition {PARTITION}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
