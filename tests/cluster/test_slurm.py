"""Runs as jobs of a real SLURM: submitted, warned of the time limit, requeued, cancelled, failing.

A run is held (SIGSTOP) where something is to happen to it, so that it happens in mid-run on every
machine; SLURM wakes whatever it signals. The run that waits for a time limit is started first.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from omegaconf import OmegaConf

from tests import processes
from tests.apps.tiny import read_metrics
from tests.cluster.jobs import STEPS, lay_out, submit, write_config


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """What jobs are submitted from: a corpus, a config, links to our folders, some programs."""
    root = lay_out(tmp_path_factory.mktemp("a project") / "root")
    for name, text in PROGRAMS.items():
        (root / f"{name}.py").write_text(text, encoding="utf-8")
    return root


PROGRAMS = {
    "crash": "raise RuntimeError('no such luck')\n",
    "tell": """
import os
names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_ARRAY_TASK_ID", "OMP_NUM_THREADS")
print(*(f"{name}={os.environ.get(name)}" for name in names))
""",
    # Of an array of two, the one with the number of the whole array is requeued once.
    "requeued": """
import os
import apps
from lingua.distributed import requeue_slurm_job
print("restart", os.environ.get("SLURM_RESTART_COUNT", "0"), flush=True)
is_whole = os.environ["SLURM_JOB_ID"] == os.environ["SLURM_ARRAY_JOB_ID"]
if is_whole and "SLURM_RESTART_COUNT" not in os.environ:
    requeue_slurm_job()
""",
}


@pytest.fixture(scope="module")
def warned(cluster, project):
    """A run of two tasks, with less left of its time than SLURM's warning is early.

    SLURM looks every 30 seconds, and wakes what is held. A thread sees to it that the requeued job
    waits for its test.
    """
    run = submit(cluster, project, "warned", "ngpu=2", "time=60")
    run.hold(after=2)
    cluster.update(run.job, TimeLimit=1)
    with ThreadPoolExecutor(1) as pool:
        run.is_requeued = pool.submit(run.put_off_when_requeued)
        yield run


@pytest.fixture(scope="module")
def whole(cluster, project):
    """A run of two tasks that nothing interrupts; time is not given."""
    run = submit(cluster, project, "whole", "ngpu=2")
    run.ends()
    return run


def bits(folder):
    """What two runs have in common if they are the same: all but times and speeds."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("speed/", "memory/", "created"))}
        for line in read_metrics(folder)
    ]


def test_a_job_trains_in_two_tasks(warned, whole):
    """While another shares the node."""
    shown = whole.ends()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert (shown["TimeLimit"], shown["Requeue"]) == ("7-00:00:00", "1")  # that of the partition
    assert shown["TresPerNode"] == "gres:gpu:2"
    for name in ("base_config.yaml", "submit.slurm", "code/apps/topk/train.py"):
        assert (whole.folder / name).is_file()
    names = [f"{whole.job}{end}" for end in (".stderr", ".stdout", *ENDS)]
    assert sorted(path.name for path in (whole.folder / "logs").iterdir()) == sorted(names)
    (start,) = json.loads((whole.folder / "provenance.json").read_text("utf-8"))
    assert start["processes"] == 2
    assert [line["global_step"] for line in read_metrics(whole.folder)] == [*range(1, STEPS + 1)]
    assert whole.checkpoints() == [STEPS]


ENDS = ("_0.out", "_0.err", "_1.out", "_1.err")


def test_two_tasks_are_two_processes_of_torchrun(whole, project, tmp_path):
    config = OmegaConf.load(project / "whole.yaml")
    config.data.root_dir, config.dump_dir = str(project), str(tmp_path / "run")
    OmegaConf.save(config, tmp_path / "config.yaml")
    done = processes.run(2, "apps.topk.train", f"config={tmp_path / 'config.yaml'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert bits(tmp_path / "run") == bits(whole.folder)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, project):
    """And what it saved goes on when it is submitted again."""
    run = submit(cluster, project, "cancelled", "ngpu=1")
    run.hold(after=2)
    cluster.run("scancel", run.job)
    shown = run.ends()
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    assert run.checkpoints() == [run.steps()] and run.steps() < STEPS
    assert "signal SIGTERM: saving and ending after this step" in run.log("_0.err")


def test_a_mistake_in_the_config_is_one_line_in_the_log_of_task_0(cluster, project):
    run = submit(cluster, project, "mistake", "ngpu=1", overrides=["model.topk.k=0"])
    shown = run.ends()
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "2:0")
    lines = [line for line in run.log("_0.err").splitlines() if line.startswith("error:")]
    assert lines == [
        "error: model.topk.k=0 is too small: TopK keeps at least 1 component, give k >= 1"
    ]
    assert "task 0: Exited with exit code 2" in run.log(".stderr")
    assert not (run.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(("stdout", "end"), [("false", "_1.err"), ("true", ".stderr")])
def test_a_crash_is_a_traceback_in_the_log_of_the_task(cluster, project, stdout, end):
    name = f"crash-{stdout}"
    run = submit(cluster, project, name, "ngpu=2", f"stdout={stdout}", script="crash")
    shown = run.ends()
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "1:0")
    assert "RuntimeError: no such luck" in run.log(end)


def test_an_array_writes_the_output_of_each_job_apart(cluster, project):
    run = submit(cluster, project, "array", "ngpu=2", "launcher=sbatch --array=3-4", script="tell")
    for task in (3, 4):
        shown = cluster.wait(f"{run.job}_{task}")
        assert (shown["JobState"], shown["TimeLimit"]) == ("COMPLETED", "7-00:00:00")
        for rank in range(2):
            said = (run.folder / f"logs/{shown['JobId']}_{rank}.out").read_text("utf-8")
            assert said == (
                f"SLURM_PROCID={rank} SLURM_NTASKS=2 SLURM_LOCALID={rank}"
                f" SLURM_ARRAY_TASK_ID={task} OMP_NUM_THREADS=1\n"
            )


def test_bash_runs_two_tasks_beside_the_step_that_it_is_in(cluster, project):
    """As from a shell by `srun --pty`, whose step has all the CPUs."""
    write_config(project, "bash")
    done = cluster.run(
        "srun", "--ntasks=1", "--gres=gpu:2", "--cpus-per-gpu=4", sys.executable, "-m",
        "lingua.stool", "launcher=bash", "script=tell", "config=bash.yaml", "nodes=1", "ngpu=2",
        cwd=project, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logs = project / "runs/bash/logs"
    assert [path.read_text("utf-8").split()[:2] for path in sorted(logs.glob("*_[01].out"))] == [
        ["SLURM_PROCID=0", "SLURM_NTASKS=2"],
        ["SLURM_PROCID=1", "SLURM_NTASKS=2"],
    ]


def test_a_job_that_slurm_refuses_says_how_to_go_on(cluster, project):
    (project / "refused.yaml").write_text("{name: tiny, dump_dir: runs/refused}", "utf-8")
    done = cluster.run(
        sys.executable, "-m", "lingua.stool", "script=tell", "config=refused.yaml", "nodes=1",
        "partition=nowhere", "time=60", cwd=project,
    )  # fmt: skip
    assert done.returncode == 1
    assert "invalid partition specified: nowhere" in done.stderr
    assert "give the same command with dirs_exists_ok=true" in done.stderr.splitlines()[-1]


def test_the_time_limit_and_a_requeue_by_hand_leave_no_trace_in_a_run(cluster, warned, whole):
    """Warned, saved, requeued, resumed; requeued again; and in the end the run that was not."""
    warned.is_requeued.result()
    first = warned.steps()
    assert warned.checkpoints() == [first] and first < STEPS
    for rank in range(2):
        assert "signal SIGUSR2: saving and ending after this step" in warned.log(f"_{rank}.err")
    assert f"requeueing SLURM job {warned.job}" in warned.log("_0.err")
    assert "requeueing" not in warned.log("_1.err")
    warned.again()

    warned.hold(after=first + 2)
    cluster.run("scontrol", "requeue", warned.job)
    warned.again()
    second = warned.steps()
    assert warned.checkpoints() == [first, second] and second < STEPS

    shown = warned.ends()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "2")
    assert warned.log("_0.out").count("resuming from") == 2  # one file of all three starts
    assert warned.checkpoints() == [first, second, STEPS]
    assert bits(warned.folder) == bits(whole.folder)


@pytest.mark.long
def test_an_element_of_an_array_requeues_itself_alone(cluster, project):
    """Also the one that has the number of the whole array."""
    words = ["ngpu=1", "launcher=sbatch --array=0-1"]
    run = submit(cluster, project, "again", *words, script="requeued")
    elements = [f"{run.job}_{task}" for task in (0, 1)]

    def requeued():
        return [one for one in elements if cluster.show(one).get("Reason") == "BeginTime"]

    cluster.wait_until(requeued, "a requeued element")
    for element in requeued():
        cluster.update(element, StartTime="now")
    restarts = {cluster.wait(one)["JobId"]: cluster.show(one)["Restarts"] for one in elements}
    assert sorted(restarts.values()) == ["0", "1"] and restarts[run.job] == "1"
