"""apps.topk.submit: a run, or a sweep of runs with their evaluations, handed to SLURM or run here.

There is no SLURM: sbatch and srun are stand-ins. With a real one: tests/cluster/test_submit.py.
"""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from apps.topk import submit
from apps.topk.submission import configs, finished
from apps.topk.submission.arguments import SubmitArgs
from lingua_topk._host.lingua import stool
from lingua_topk.errors import CheckpointError
from lingua_topk.host import submitted_from
from tests.apps.tiny import CONFIG, read_metrics, write_corpus

ROOT = Path(__file__).resolve().parents[2]
EVALUATION = """
name: mine
validation: {context: 8, max_documents: 2}
"""
# Counts from 41 on; fails for a script that the file `refused` names.
SBATCH = """#!/bin/bash
here="$(dirname "$0")"
echo "$*" >>"$here/sbatch.words"
if [[ -f "$here/refused" && "$*" == *"$(<"$here/refused")" ]]; then
  echo "sbatch: error: no" >&2
  exit 1
fi
[[ "$*" == *--parsable* ]] || printf 'Submitted batch job '
echo "$((40 + $(wc -l <"$here/sbatch.words")))"
"""
# Starts one process.
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == *=* ]] && shift || shift 2; done
unset SLURM_JOB_ID
exec "$@"
"""
# Only says what and where.
TELLS = """#!/bin/bash
printf '%s\\n' "$PWD" "$OLDPWD" "$DUMP_DIR" "$LAUNCH_WITH" "${!#}"
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """This process in a folder with links to ours, text, and two configs with relative paths."""
    root = tmp_path / "a project"
    write_corpus(root)
    for name in ("apps", "lingua_topk"):
        (root / name).symlink_to(ROOT / name)
    (root / "configs").mkdir()
    for name in ("topk_a", "b"):
        config = OmegaConf.create(CONFIG)
        config.update(name=name, dump_dir=f"runs/{name}", steps=4)
        config.data.root_dir = "."
        OmegaConf.save(config, root / "configs" / f"{name}.yaml")
    (root / "eval.yaml").write_text(EVALUATION, encoding="utf-8")
    (root / "bin").mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name in [one for one in os.environ if one.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    stand_in(root, "sbatch", SBATCH)
    return root


def stand_in(root, name, text):
    path = root / "bin" / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def submitted(project, capfd):
    """Call it with words: the exit status, and what was said to stdout and stderr."""

    def call(*words):
        status = 0
        try:
            limits = ["time=90", *(["eval_time=30"] if "sweep=" in "".join(words) else [])]
            submit.main(["partition=gpus", *limits, *words])
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    return call


SWEEP = ("sweep=configs", "eval_config=eval.yaml")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_refused(done, *said):
    status, _, stderr = done
    assert status == 2
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    for words in said:
        assert words in line


def test_a_sweep_is_an_array_with_an_array_of_evaluations_behind_it(project, submitted):
    status, said, _ = submitted(*SWEEP, "max_parallel=3", "ngpu=4", "eval_ngpu=1", "qos=high")
    assert status == 0
    sweep = project / "runs" / "sweep"
    assert (project / "bin/sbatch.words").read_text("utf-8").splitlines() == [
        f"--parsable {sweep}/submit.slurm",
        f"--parsable --dependency=aftercorr:41 --kill-on-invalid-dep=yes {sweep}/evaluate.slurm",
    ]
    assert "4 runs as job array 41, elements 0 to 3\n" in said
    assert "squeue --jobs=41,42\n" in said and "scancel 41 42," in said
    assert f"sbatch --array=N '{sweep}/submit.slurm' goes on" in said
    again = "sbatch --dependency=aftercorr:JOB --kill-on-invalid-dep=yes --array=N"
    assert f"{again} '{sweep}/evaluate.slurm', JOB being" in said
    scripts = [(sweep / name).read_text("utf-8") for name in ("submit.slurm", "evaluate.slurm")]
    for script, gpus, minutes, name in zip(scripts, (4, 1), (90, 30), ("", "-eval"), strict=True):
        for option in (
            f'--job-name="runs{name}"', "--nodes=1", f"--gres=gpu:{gpus}", "--array=0-3%3",
            f"--time={minutes}", "--qos=high", "--partition=gpus", "--signal=USR2@120",
            f'--output="{sweep}/logs/%A_%a.stdout"', "--requeue",
        ):  # fmt: skip
            assert script.count(f"\n#SBATCH {option}\n") == 1
        assert script.count("--job-name") == script.count("--output") == 1
    assert (sweep / "logs").is_dir()


def test_the_runs_of_a_sweep_and_their_twins(project, submitted):
    words = ["train.steps=7", "train.model.topk.k=8", "eval.validation.context=4"]
    status, said, _ = submitted(*SWEEP, *words)
    assert status == 0
    for name, k in (("topk_a", 8), ("vanilla_a", None), ("b", 8), ("vanilla_b", None)):
        run = project / "runs" / name
        config = OmegaConf.load(run / "base_config.yaml")
        assert (config.name, config.dump_dir, config.steps) == (name, str(run), 7)
        assert (config.model.topk and config.model.topk.k) == k
        assert config.data.root_dir == str(project)
        evaluation = OmegaConf.load(run / "evals/mine/base_config.yaml")
        assert evaluation.ckpt_dir == str(run) and evaluation.dump_dir == str(run / "evals/mine")
        assert evaluation.validation.context == 4
        kind = f"TopK, k = {k}" if k else "vanilla"
        assert re.search(rf"^\d  {name} +{kind} +7 +runs/{name} ", said, re.MULTILINE)
        for folder in (run, run / "evals/mine"):
            assert (folder / "logs").is_dir()
            assert (folder / "code").resolve() == project / "runs/sweep/code.1"
    copied = project / "runs" / "sweep" / "code"
    assert (copied / "apps/topk/train.py").is_file() and (copied / ".commit").is_file()
    assert not (copied / "runs").exists()  # the folders of jobs are not copied


@pytest.mark.parametrize("script", ["submit.slurm", "evaluate.slurm"])
def test_an_element_of_the_array_is_its_run(project, submitted, script):
    submitted(*SWEEP)
    stand_in(project, "srun", TELLS)
    array = project / "runs" / "sweep" / script
    done = subprocess.run(
        ["bash", array], env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"}, cwd="/",
        capture_output=True, text=True,
    )  # fmt: skip
    where, before, dump_dir, launched, config = done.stdout.splitlines()
    job = project / "runs" / "vanilla_a" / ("" if script == "submit.slurm" else "evals/mine")
    assert (dump_dir, config) == (str(job), f"config={job}/base_config.yaml")
    assert where == str(project / "runs/sweep/code.1")
    # Relative paths mean what they meant where the command was given.
    variables = {"OLDPWD": before, "DUMP_DIR": dump_dir, "LAUNCH_WITH": launched}
    assert submitted_from(variables, Path(where)) == project


def test_a_sweep_elsewhere_without_twins_and_evaluations(project, submitted):
    words = ["sweep=[configs/b.yaml]", "sweep_dir=there", "twins=false", "eval_config=null"]
    assert submitted(*words)[0] == 0
    assert sorted(path.name for path in (project / "there").iterdir()) == ["b", "sweep"]
    assert OmegaConf.load("there/b/base_config.yaml").dump_dir == str(project / "there/b")
    assert len((project / "bin/sbatch.words").read_text("utf-8").splitlines()) == 1
    assert not (project / "there/sweep/evaluate.slurm").exists() and not Path("runs").exists()


def test_a_dry_run_shows_all_and_writes_nothing(project, submitted):
    before = files(project)
    status, said, _ = submitted(*SWEEP, "dry_run=true")
    assert status == 0 and files(project) == before
    for script in ("sweep/submit.slurm", "sweep/evaluate.slurm", "b/submit.slurm"):
        assert f"# {project}/runs/{script}\n#!/bin/bash\n#SBATCH " in said
    assert "-m apps.topk.submission.evaluate" in said
    assert said.count("\n#SBATCH --array=0-3\n") == 2 and "dry run: nothing was written" in said
    Path("runs/b").mkdir(parents=True)
    assert "runs/b exists: without dirs_exists_ok=true" in submitted(*SWEEP, "dry_run=true")[1]


def test_what_is_there_is_not_touched(project, submitted):
    kept = project / "runs/vanilla_b/metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}\n", encoding="utf-8")
    assert_refused(submitted(*SWEEP), f"{kept.parent} exists: give sweep_dir=FOLDER")
    assert files(project / "runs") == ["vanilla_b/metrics.jsonl"]
    assert not (project / "bin/sbatch.words").exists()
    assert submitted(*SWEEP, "dirs_exists_ok=true")[0] == 0
    code = project / "runs/sweep/code"
    first = code.resolve()
    Path("new.py").touch()
    assert submitted(*SWEEP, "dirs_exists_ok=true")[0] == 0  # as after a first time
    # Jobs that are at work go on in the copy that they began with, whose place it keeps.
    assert (first.name, code.resolve().name) == ("code.1", "code.2")
    assert (code / "new.py").exists() and not (first / "new.py").exists()
    assert "/sweep/code.2' || exit 1\n" in (kept.parent / "submit.slurm").read_text("utf-8")
    assert kept.read_text("utf-8") == "{}\n"
    (kept.parent / "code").unlink()
    (kept.parent / "code").mkdir()
    assert_refused(submitted(*SWEEP, "dirs_exists_ok=true"), "an earlier job's copy of the code")


def test_what_sbatch_refuses(project, submitted):
    (project / "bin/refused").write_text("sweep/evaluate.slurm", encoding="utf-8")
    status, said, stderr = submitted(*SWEEP)
    assert status == 1 and "job array 41" in said
    assert stderr.splitlines()[0] == "sbatch: error: no"
    assert "sbatch --dependency=aftercorr:41 --kill-on-invalid-dep=yes" in stderr.splitlines()[1]
    (project / "bin/refused").write_text("sweep/submit.slurm", encoding="utf-8")
    status, said, stderr = submitted(*SWEEP, "dirs_exists_ok=true")
    assert status == 1 and "submitted" not in said
    assert "error: sbatch ended with status 1" in stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give config=FILE for one run, or sweep=FOLDER"),
        (["sweep=configs", "config=configs/b.yaml"], "and not both"),
        (["sweep=nowhere"], "sweep=nowhere is no folder"),
        (["sweep=bin"], "sweep=bin holds no config"),
        (["sweep=[configs/b.yaml,nowhere.yaml]"], "config=nowhere.yaml is not a file"),
        (["sweep=[configs/b.yaml,configs/b.yaml]"], "name=b is that of configs/b.yaml and of"),
        (["sweep=configs", "train.stepz=1"], "stepz (in train.* on the command line) is no known"),
        (["sweep=configs", "train.model.topk.k=0"], "configs/b.yaml: model.topk.k=0 is too small"),
        (["sweep=configs", "train.name=x"], "train.name=x would be that of all runs"),
        (["sweep=configs", "steps=3"], "steps is a key of the runs, not of the submission: write"),
        (["sweep=configs", "stepz=3"], "stepz (in the command line) is no known key"),
        (["sweep=configs", "eval.dump_dir=x"], "eval.dump_dir=x would be that of all evaluations"),
        (["sweep=configs", "train.checkpoint.path=x"], "checkpoint.path=x is not allowed in a"),
        (["sweep=configs", "train=3"], "train (in the command line): "),
        (["sweep=configs", "eval.harness.limitt=1"], "harness.limitt (in eval.* on the command"),
        (["sweep=configs", "eval.validation.context=99"], "eval.yaml: validation.context=99"),
        (["sweep=configs", "eval.name=a/b"], "name=a/b is no name of a folder in evals/"),
        (["sweep=configs", "eval.name='0000000004'"], "is no name of a folder in evals/"),
        (["sweep=configs", "eval_config=nowhere.yaml"], "eval_config=nowhere.yaml is not a file"),
        (["sweep=configs", "eval_time=0"], "eval_time=0 is not allowed"),
        (["sweep=configs", "eval_time=3"], "eval_time=3 is too short"),
        (["sweep=configs", "eval_time=1:00:00"], "eval_time=1:00:00 is no number: give minutes"),
        (["sweep=configs", "sweep_dir=eval.yaml/x"], "cannot be made: "),
        (["sweep=configs", "eval_ngpu=-1"], "eval_ngpu=-1 is too small"),
        (["sweep=configs", "max_parallel=-1"], "max_parallel=-1 is too small"),
        (["sweep=configs", "launcher=echo"], "launcher='echo' cannot start a sweep"),
        (["sweep=configs", "script=apps.main.train"], "a sweep is of apps.topk.train"),
        (["sweep=configs", "override=true"], "override=true would delete the folders"),
        (["sweep=configs", "nodes=0"], "nodes=0 is too small"),
        (["sweep=configs", "qos=a#b"], "qos='a#b' has a character"),
        (["sweep=configs", "sweep_dir=100%"], "has a character that sbatch reads as its own"),
        (["sweep=configs", "nods=2"], "nods (in the command line) is no known key"),
        (["sweep=configs", "--nodes"], "is not of the form key=value"),
        (["config=configs/b.yaml", "max_parallel=2"], "max_parallel=2 goes with sweep"),
        (["config=configs/b.yaml", "twins=false"], "twins=False goes with sweep"),
        (["config=configs/b.yaml", "train.stepz=1"], "stepz (in train.* on the command line)"),
        (["config=nowhere.yaml"], "config=nowhere.yaml is not a file"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(project, submitted, words, said):
    before = files(project)
    default = ["eval_config=eval.yaml"] if "sweep=" in "".join(words) else []
    assert_refused(submitted(*default, *words), said)
    assert files(project) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dump_dir": "elsewhere/b"}, "dump_dir in several folders"),
        ({"dump_dir": "runs/topk_a"}, "is that of configs/b.yaml and of configs/topk_a.yaml"),
        ({"dump_dir": "runs/sweep"}, "runs/sweep is the sweep's own"),
        ({"dump_dir": ""}, "configs/b.yaml: dump_dir= is no text"),
        ({"name": "vanilla_a"}, "vanilla twin of configs/topk_a.yaml, and it has model.topk"),
        ({"name": "a\tb"}, "configs/b.yaml: name='a\\tb' has a character"),
        ({"modle": 1}, "modle (in configs/b.yaml) is no known key"),
        ({"seed": "${nothing}"}, "nothing"),
        ({"save_at": [0]}, "configs/b.yaml: save_at=[0] is not allowed"),
    ],
)
def test_configs_that_make_no_sweep_are_refused(project, submitted, changes, said):
    config = OmegaConf.load("configs/b.yaml")
    OmegaConf.save(OmegaConf.merge(config, changes), "configs/b.yaml")
    before = files(project)
    assert_refused(submitted(*SWEEP), said)
    assert files(project) == before


def test_a_twin_that_has_a_config_of_its_own_is_that(project, submitted):
    config = OmegaConf.load("configs/b.yaml")
    config.update(name="vanilla_a", dump_dir="runs/by_hand")
    config.model.topk = None
    OmegaConf.save(config, "configs/b.yaml")
    runs = configs.read_sweep(SubmitArgs(sweep="configs"))
    assert [(run.name, run.dump_dir.name, run.is_made) for run in runs] == [
        ("vanilla_a", "by_hand", False), ("topk_a", "topk_a", False),
    ]  # fmt: skip


def test_data_that_is_not_here_is_said_and_not_refused(project, submitted):
    status, _, stderr = submitted(*SWEEP, "train.data.root_dir=/scratch")
    assert status == 0
    (line,) = stderr.splitlines()
    assert line.startswith("warning: /scratch/text is not on this machine")


def test_the_sweep_of_the_paper():
    """Six shapes, in their order, each with its twin."""
    runs = configs.read_sweep(SubmitArgs(sweep=str(ROOT / "configs" / "paper")))
    shapes = [f"d{d}_l{n}" for d in (1024, 2048) for n in (8, 16, 24)]
    names = [f"{kind}_{shape}" for shape in shapes for kind in ("topk", "vanilla")]
    assert [run.name for run in runs] == names
    assert [run.dump_dir for run in runs] == [Path.cwd() / "dumps/paper" / name for name in names]
    for topk, vanilla in zip(runs[::2], runs[1::2], strict=True):
        assert topk.config.model.topk.k == 64 and vanilla.config.model.topk is None
        differ = {key for key in topk.config if topk.config[key] != vanilla.config[key]}
        assert differ == {"name", "dump_dir", "model"}
        words = "".join(topk.file.read_text("utf-8").splitlines(keepends=True)[:4])
        assert f"name={vanilla.name} dump_dir={vanilla.dump_dir.relative_to(Path.cwd())}" in words


def test_one_run_is_a_job_of_stool(project, submitted):
    status, said, _ = submitted("config=configs/b.yaml", "train.steps=9", "ngpu=2")
    run = project / "runs" / "b"
    assert status == 0
    assert "submitted job 41\n" in said and "scancel --signal=TERM 41 saves" in said
    assert (project / "bin/sbatch.words").read_text("utf-8") == f"--parsable {run}/submit.slurm\n"
    assert OmegaConf.load(run / "base_config.yaml").steps == 9
    assert "-m apps.topk.train 'config=" in (run / "submit.slurm").read_text("utf-8")
    assert (run / "code/apps/topk/train.py").is_file()
    assert_refused(submitted("config=configs/b.yaml"), "exists: give another, or dirs_exists_ok")


def test_a_single_run_that_sbatch_refuses(project, submitted):
    (project / "bin/refused").write_text("b/submit.slurm", encoding="utf-8")
    status, said, stderr = submitted("config=configs/b.yaml")
    assert status == 1 and "submitted job" not in said
    assert stderr.splitlines()[-1].endswith("give the same command with dirs_exists_ok=true")


def test_one_run_of_another_program_has_keys_of_its_own(project, submitted):
    Path("tool.py").touch()
    Path("other.yaml").write_text("{name: n, dump_dir: d, mine: 1}", encoding="utf-8")
    words = ["script=tool", "config=other.yaml", "train.mine=2", "dry_run=true"]
    status, said, _ = submitted(*words)
    assert status == 0 and "-m tool" in said and not Path("d").exists()


def test_a_sweep_runs_here_one_after_the_other(project, submitted, monkeypatch):
    """The second fails, where its data are not: its evaluation is not started."""
    config = OmegaConf.load("configs/b.yaml")
    config.data.root_dir = "nowhere"
    OmegaConf.save(config, "configs/b.yaml")
    stand_in(project, "srun", SRUN)
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # within an allocation
    sweep = ["sweep=[configs/topk_a.yaml,configs/b.yaml]", "twins=false", "launcher=bash"]
    status, said, stderr = submitted(*sweep, "eval_config=eval.yaml", "ngpu=1")
    assert status == 1, stderr[-3000:]
    lines = said.splitlines()[-4:]
    assert lines[0] == "run topk_a: done" and lines[2] == "evaluation topk_a: done"
    assert lines[1].startswith("run b: FAILED: status 2; see ")
    assert lines[3] == "evaluation b: FAILED: not started, since its run is not done"
    assert "data.sources: " in stderr
    run = project / "runs" / "topk_a"
    assert len(read_metrics(run)) == 4
    assert (run / "evals/mine/validation.json").is_file()
    assert not (project / "runs/b/evals/mine/validation.json").exists()


def test_a_run_that_was_paused_is_not_done(tmp_path):
    def made(step):
        folder = tmp_path / "checkpoints" / f"{step:010}"
        folder.mkdir(parents=True)
        (folder / ".metadata").touch()
        return folder

    with pytest.raises(CheckpointError, match=r"has no config.yaml: the run did not start"):
        finished.finished_checkpoint(tmp_path)
    (tmp_path / "config.yaml").write_text("steps: 20\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        finished.finished_checkpoint(tmp_path)
    made(5)
    with pytest.raises(CheckpointError, match=r"is at step 5 of 20: the run was paused"):
        finished.finished_checkpoint(tmp_path)
    last = made(20)
    assert finished.finished_checkpoint(tmp_path) == last


def test_ctrl_c_waits_for_what_saves(tmp_path):
    """Killed at once, as `subprocess.call` does, torchrun would leave a half-done step behind."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may be in the background
    saved = tmp_path / "saved"
    with pytest.raises(KeyboardInterrupt):
        # Not before the parent waits for it.
        words = f"sleep 2; kill -INT $PPID; sleep 1; touch {saved}; exit 0"
        stool.run_launcher(["bash", "-c", words])
    assert saved.exists()
