"""lingua.stool: a program submitted as a job, from a copy of the code.

The project that jobs are submitted from holds links to our folders, an environment, the data
and a config with relative paths. There is no SLURM here, also where the machine has one: bash runs
the job, srun and sinfo are stand-ins where they are wanted. A real one is in tests/cluster.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lingua import stool
from lingua._sbatch import partition_limits
from lingua.errors import ConfigError
from lingua.stool import StoolArgs
from lingua_topk.host import EMBEDDED_ROOT, submitted_from
from tests.apps.tiny import CONFIG, read_metrics, write_corpus

ROOT = Path(__file__).resolve().parents[2]
JOB = """
name: tiny
dump_dir: runs/first
eval: {validation: {sources: [text/text.val.jsonl], use_val_from_train_src: false, context: 8}}
"""
NO_CLUSTER = {"SLURM_CONF": os.devnull}
# Writes down its words, then runs the command for one process.
SRUN = """#!/bin/bash
echo "$PWD $*" >"$(dirname "$0")/srun.words"
env | grep -E '^SLURM_(CPU_BIND|MEM_BIND|OVERLAP|DISABLE|OPEN)' >"$(dirname "$0")/srun.variables"
while [[ "$1" == -* ]]; do [[ "$1" == *=* ]] && shift || shift 2; done
unset SLURM_JOB_ID
exec "$@"
"""


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "a project"
    write_corpus(root)
    for name in ("apps", "lingua_topk"):
        (root / name).symlink_to(ROOT / name)
    for name in ("env/pyvenv.cfg", "env/lib/package.py", ".git/hook.py", "notes.txt", "tool.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    config = OmegaConf.merge(OmegaConf.create(CONFIG), OmegaConf.create(JOB))
    config.steps, config.data.root_dir = 4, "."
    OmegaConf.save(config, root / "job.yaml")
    return root


def environment(project, **variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LINGUA_", "SLURM_"))}
    path = os.pathsep.join([str(project / "bin"), os.environ["PATH"]])
    return {**clean, "PATH": path, "PYTHONPATH": str(EMBEDDED_ROOT), **NO_CLUSTER, **variables}


def submit(project, *words, **variables):
    words = ["script=apps.topk.train", "config=job.yaml", "nodes=1", "partition=gpus", *words]
    return subprocess.run(
        [sys.executable, "-m", "lingua.stool", *words], cwd=project, text=True,
        env=environment(project, **variables), capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def stand_in(project, name, text):
    path = project / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_refused(done, *said):
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    for words in said:
        assert words in line


def test_bash_runs_the_job_in_several_processes(project):
    done = submit(project, "launcher=bash", "ngpu=2")
    assert done.returncode == 0, done.stderr[-3000:]
    run = project / "runs" / "first"
    assert len(read_metrics(run)) == 4
    assert json.loads((run / "evals/0000000004/validation.json").read_text("utf-8"))
    (start,) = json.loads((run / "provenance.json").read_text("utf-8"))
    assert (start["host"], start["processes"]) == ("embedded host", 2)


def test_the_job_runs_from_the_copy_alone(project):
    """What was there when it was submitted runs, whatever becomes of it afterwards."""
    assert submit(project, "launcher=echo", "ngpu=1").returncode == 0
    run = project / "runs" / "first"
    (project / "apps").unlink()
    (project / "lingua_topk").unlink()
    (project / "job.yaml").unlink()
    done = subprocess.run(
        ["bash", run / "submit.slurm"], cwd=project.parent, capture_output=True, text=True,
        env=environment(project, PYTHONPATH=""),
    )  # fmt: skip
    # No such command, or one that finds no SLURM.
    assert done.returncode != 0 and "srun: " in done.stderr
    stand_in(project, "srun", SRUN)
    done = subprocess.run(
        ["bash", run / "submit.slurm"], cwd=project.parent, capture_output=True, text=True,
        env=environment(project, PYTHONPATH="", PYTHONVERBOSE="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_metrics(run)) == 4
    for module in ("apps/topk/seam", "lingua_topk/patch", "lingua_topk/_host/lingua/data"):
        assert f"{run}/code.1/{module}.py" in done.stderr
    assert f"{ROOT}/" not in done.stderr.replace(sys.prefix, "")


def test_what_is_copied_is_code(project):
    submit(project, "launcher=echo", "ngpu=1")
    submit(project, "launcher=echo", "ngpu=1", "dirs_exists_ok=true")  # not its own copy
    copied = files(project / "runs/first/code")
    assert {"tool.py", "apps/__init__.py", "apps/topk/train.py"} < set(copied)
    assert "lingua_topk/_host/apps/main/train.py" in copied
    assert all(name.endswith(".py") for name in copied if name != ".commit")
    assert not any(name.startswith(("env", ".git", "runs")) for name in copied)


def test_a_folder_that_is_reached_twice_is_copied_twice_and_one_around_it_not(project):
    """A link into the project, and one to the folder that holds it."""
    (project / "mylib").mkdir()
    (project / "mylib" / "code.py").touch()
    (project / "another").mkdir()
    (project / "another" / "mylib").symlink_to(project / "mylib")
    (project / "mylib" / "around").symlink_to(project)
    submit(project, "launcher=echo", "ngpu=1")
    copied = files(project / "runs/first/code")
    assert {"mylib/code.py", "another/mylib/code.py"} < set(copied)
    assert not any("around" in name for name in copied)


def test_a_job_knows_its_commit_and_where_lingua_is(project, tmp_path):
    home = tmp_path / "lingua home"
    (home / "lingua").mkdir(parents=True)
    submit(project, "launcher=echo", "ngpu=1", LINGUA_HOME=str(home))
    script = (project / "runs/first/submit.slurm").read_text("utf-8")
    assert f"export LINGUA_HOME='{home}'\n" in script
    assert (project / "runs/first/code/.commit").is_file()
    assert_refused(submit(project, "launcher=echo", LINGUA_HOME="/nope"), "LINGUA_HOME='/nope'")


def test_the_files_of_a_job(project):
    # That srun runs what it is given, another test shows.
    stand_in(project, "srun", SRUN.replace('exec "$@"', '[[ -x "$1" ]]'))
    words = ["launcher=bash", "ngpu=1", "qos=high", "account=us", "time=90"]
    done = submit(project, *words, SLURM_JOB_ID="1")
    assert done.returncode == 0, done.stderr[-3000:]
    run = project / "runs" / "first"
    script = (run / "submit.slurm").read_text("utf-8")
    for option in (
        "--job-name=tiny", "--nodes=1", "--gres=gpu:1", "--cpus-per-gpu=16", "--time=90",
        "--partition=gpus", "--mem=0", "--qos=high", "--account=us", "--requeue",
        "--signal=USR2@120",
        f'--output="{run}/logs/%j.stdout"',
    ):  # fmt: skip
        assert f"\n#SBATCH {option}\n" in script
    assert "--exclude" not in script and "--constraint" not in script
    assert (run / "logs").is_dir()
    config = OmegaConf.load(run / "base_config.yaml")
    assert config.dump_dir == str(run) and config.data.root_dir == str(project)
    folder, _, words = (
        (project / "bin/srun.words").read_text("utf-8").partition(" --kill-on-bad-exit=1 -n ")
    )
    assert folder == str(run / "code.1")
    assert words.startswith(f"1 -N 1 -o {run}/logs/%j_%t.out -e {run}/logs/%j_%t.err ")


BOUND = {
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x2",
    "SLURM_CPU_BIND_LIST": "0x2",
    "SLURM_MEM_BIND": "no",
}


@pytest.mark.parametrize("launcher", ["echo", "bash"])
def test_the_binding_of_the_shell_that_submits_is_not_the_jobs(project, launcher):
    """sbatch hands on what `srun --pty` has set, and srun would want those CPUs of the job."""
    stand_in(project, "srun", SRUN.replace('exec "$@"', '[[ -x "$1" ]]'))
    submit(project, f"launcher={launcher}", "ngpu=1", SLURM_JOB_ID="1", **BOUND)
    for variables in (BOUND, {}):
        done = subprocess.run(
            ["bash", project / "runs/first/submit.slurm"], capture_output=True, text=True,
            env=environment(project, **variables),
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        # Within an allocation: beside the step that bash is in, Ctrl-C to the tasks, logs kept.
        expected = ["SLURM_DISABLE_STATUS=1", "SLURM_OPEN_MODE=append", "SLURM_OVERLAP=1"]
        said = (project / "bin/srun.variables").read_text("utf-8").splitlines()
        assert sorted(said) == (expected if launcher == "bash" else [])


def test_all_output_in_one_place_if_asked(project):
    script = submit(project, "dry_run=true", "stdout=true", "time=5").stdout
    assert "srun --kill-on-bad-exit=1 -n 8 -N 1 " in script and "%t" not in script


def test_a_dry_run_shows_the_job_and_writes_nothing(project):
    before = files(project)
    done = submit(project, "dry_run=true")  # neither sbatch nor an answer of sinfo is needed
    assert done.returncode == 0
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert "--time" not in done.stdout
    assert f"files of code would be copied to {project}/runs/first/code.1" in done.stdout
    assert files(project) == before
    (project / "runs/first").mkdir(parents=True)
    assert "without dirs_exists_ok=true" in submit(project, "dry_run=true").stdout


def test_the_launchers_status_is_passed_on(project):
    stand_in(project, "refuses", "#!/bin/bash\nexit 7\n")
    done = submit(project, "launcher=refuses")
    assert done.returncode == 7
    said = f"refuses ended with status 7, and dump_dir={project}/runs/first stays as it is"
    assert said in done.stderr and "dirs_exists_ok=true" in done.stderr


def test_a_failing_program_is_a_failing_job(project):
    config = OmegaConf.load(project / "job.yaml")
    config.model.topk.k = 0
    OmegaConf.save(config, project / "job.yaml")
    done = submit(project, "launcher=bash", "ngpu=1")
    assert done.returncode != 0
    assert "model.topk.k=0 is too small" in done.stderr


ODD_CONFIGS = {
    "numbers": "dump_dir: d, data: {root_dir: 5}",
    "sections": "dump_dir: d, checkpoint: {path: {a: 1}}",
    "lists": "dump_dir: d, data: [1]",
    "below": "dump_dir: tool.py/run",
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nodes=0"], "nodes=0 is too small"),
        (["ngpu=0"], "ngpu=0 is too small"),
        (["time=0"], "time=0 is not allowed"),
        (["time=1.5"], "1.5"),
        (["time=4", "launcher=sbatch"], "time=4 is too short: SLURM warns the program"),
        (["partition="], "partition='' is empty"),
        (["time=2:00:00"], "time=2:00:00 is no number: give minutes"),
        (["config=numbers.yaml"], "data.root_dir=5 is no path: write it as text"),
        (["config=sections.yaml"], "checkpoint.path={'a': 1} is no path"),
        (["config=lists.yaml"], "data.root_dir: "),
        (["config=below.yaml"], "tool.py/run cannot be made: "),
        (["nods=2"], "nods: Key 'nods' not in 'StoolArgs'"),
        (["config=nowhere.yaml"], "config=nowhere.yaml is not a file"),
        (["script=apps.topk.trane"], "script=apps.topk.trane is not in"),
        (["script=apps/topk/train.py"], "is no module"),
        (["launcher=srungle"], "launcher='srungle' is not installed here"),
        (["launcher=bash", "nodes=2"], "nodes=2 needs srun"),
        (["anaconda=/nowhere"], "anaconda=/nowhere has no bin/python"),
        (["qos=a\tb"], "qos='a\\tb' has a character that sbatch reads as its own"),
        (["account=p#q"], "account='p#q' has a character that sbatch reads as its own"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(project, words, said):
    for name, content in ODD_CONFIGS.items():
        (project / f"{name}.yaml").write_text(f"{{name: n, {content}}}", encoding="utf-8")
    before = files(project)
    assert_refused(submit(project, "launcher=echo", *words), said)
    assert files(project) == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dump_dir", None, "config needs dump_dir and name"),
        ("name", "", "config needs dump_dir and name"),
        ("name", 'a"b', "sbatch reads as its own"),
        ("name", "a'b", "sbatch reads as its own"),
        ("name", "a#b", "sbatch reads as its own"),
        ("dump_dir", "a\\b", "sbatch reads as its own"),
        ("dump_dir", "runs/100%", "sbatch reads as its own"),
        ("dump_dir", ".", "holds the code that would be copied"),
        ("dump_dir", "..", "holds the code that would be copied"),
    ],
)
def test_a_config_that_makes_no_job_is_refused(project, key, value, said):
    config = OmegaConf.load(project / "job.yaml")
    config[key] = value
    OmegaConf.save(config, project / "job.yaml")
    assert_refused(submit(project, "launcher=echo"), said)


def test_a_folder_that_is_there_is_not_touched(project):
    kept = project / "runs/first/metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}\n", encoding="utf-8")
    assert_refused(submit(project, "launcher=echo"), "exists: give another, or dirs_exists_ok=true")
    assert_refused(submit(project, "launcher=echo", "override=true"), "there is nobody to ask")
    assert files(kept.parent) == ["metrics.jsonl"]
    assert submit(project, "launcher=echo", "dirs_exists_ok=true").returncode == 0
    assert kept.read_text(encoding="utf-8") == "{}\n"
    assert (kept.parent / "submit.slurm").is_file()


@pytest.fixture
def in_project(project, monkeypatch):
    """This process in the project, a terminal before it."""
    monkeypatch.chdir(project)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    return project


def test_the_code_under_a_job_never_changes(in_project):
    """Also not that of a stool which does not number the copies."""
    run = in_project / "runs/first"

    def submit_again():
        stool.launch_job(
            StoolArgs(
                config=OmegaConf.load("job.yaml"), launcher="true", script="tool", nodes=1, time=5,
                dirs_exists_ok=True,
            )
        )  # fmt: skip
        return (run / "submit.slurm").read_text("utf-8")

    for number in (1, 2):
        assert f"\ncd '{run}/code.{number}' || exit 1\n" in submit_again()
        assert (run / "code").resolve() == run / f"code.{number}"
    # And a job in an earlier copy, requeued for example, knows still where it was submitted.
    job = {"LAUNCH_WITH": "SBATCH", "OLDPWD": str(in_project), "DUMP_DIR": str(run)}
    assert submitted_from(job, run / "code.1") == submitted_from(job, run / "code.2") == in_project
    Path("new.py").touch()
    (run / "code").unlink()
    (run / "code").mkdir()
    submit_again()
    assert [(run / f"code.{n}/new.py").exists() for n in (1, 2, 3)] == [False, False, True]
    assert not any((run / "code").iterdir())


def test_a_job_is_submitted_also_where_nobody_reads(project):
    stand_in(project, "sbatch", '#!/bin/bash\necho "$*" >"$(dirname "$0")/sbatch.words"\n')
    reads, writes = os.pipe()
    os.close(reads)
    words = ["script=tool", "config=job.yaml", "nodes=1", "time=5"]
    done = subprocess.run(
        [sys.executable, "-m", "lingua.stool", *words], cwd=project, env=environment(project),
        stdout=writes, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")
    assert (project / "bin/sbatch.words").exists()


@pytest.mark.parametrize("copy_code", [True, False])
@pytest.mark.parametrize(("answer", "kept"), [("no", True), ("", True), ("yes", False)])
def test_override_deletes_after_a_yes(in_project, monkeypatch, copy_code, answer, kept):
    old = in_project / "runs/first/old"
    old.mkdir(parents=True)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    args = StoolArgs(
        config=OmegaConf.load("job.yaml"), launcher="echo", script="tool", nodes=1, time=5,
        override=True, copy_code=copy_code,
    )  # fmt: skip
    assert stool.launch_job(args) == kept
    assert old.exists() == kept
    assert (in_project / "runs/first/submit.slurm").exists() == (not kept)


def test_the_environment_of_the_job(in_project, tmp_path, capsys):
    """A conda environment by conda's hook, a venv by its script, another by its path."""
    expected = {
        "conda-meta/history": ['eval "$(', f"conda activate {tmp_path}/e0"],
        "bin/activate": [f"source {tmp_path}/e1/bin/activate"],
        "other": [f'export PATH={tmp_path}/e2/bin:"$PATH"'],
    }
    for number, (mark, lines) in enumerate(expected.items()):
        prefix = tmp_path / f"e{number}"
        for name in ("bin/python", mark):
            (prefix / name).parent.mkdir(parents=True, exist_ok=True)
            (prefix / name).touch()
        stool.launch_job(
            StoolArgs(
                config={"name": "n", "dump_dir": "d"}, script="tool", nodes=1,
                anaconda=str(prefix), dry_run=True,
            )
        )  # fmt: skip
        script = capsys.readouterr().out
        assert f"srun --kill-on-bad-exit=1 -n 8 -N 1 -o {in_project}" in script.replace("'", "")
        assert f"{prefix}/bin/python -u -m tool" in script
        for line in lines:
            assert line in script


SINFO = """#!/bin/bash
[[ "$*" == "--noheader --format=%R %l" ]] || exit 1
printf '%s\\n' 'short 30:00' 'long 7-00:00:00' 'odd 1:02:03' 'open infinite'
"""


def test_the_limit_of_the_partition_is_asked_for(project, monkeypatch):
    stand_in(project, "sinfo", SINFO)
    monkeypatch.setenv("PATH", f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}")
    limits = {"short": 30, "long": 7 * 24 * 60, "odd": 63, "open": 14 * 24 * 60}
    assert partition_limits() == limits
    assert "--time=30\n" in submit(project, "dry_run=true", "partition=short").stdout
    assert "--time=4320\n" in submit(project, "dry_run=true", "partition=unheard").stdout
    with_options = submit(project, "dry_run=true", "partition=short", "launcher=sbatch --hold")
    assert "--time=30\n" in with_options.stdout
    # One job may start in any of them.
    several = ["partition=unheard,long,odd", "launcher=sbatch --array=0-9%2", "account=0123"]
    said = submit(project, "dry_run=true", *several).stdout
    assert "--time=63\n" in said and "--account=0123\n" in said


def test_without_slurm_to_ask_a_time_is_wanted(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"time=-1 asks SLURM .* give time in minutes"):
        partition_limits()
