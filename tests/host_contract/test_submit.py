"""apps.topk.submit on a checkout of Lingua: the scripts are those of Lingua's own stool.

srun is a stand-in that starts one process, as in test_stool.py.
"""

import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from tests.apps.tiny import read_metrics
from tests.host_contract.test_stool import HOME, copy_checkout, lay_out, link_ours

pytestmark = pytest.mark.skipif(not HOME, reason="LINGUA_HOME names no checkout of Meta Lingua")


def submit(folder, *words, **variables):
    """Within an allocation; nothing is activated, and there is no rsync."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LINGUA_", "SLURM_"))}
    path = os.pathsep.join([str(folder / "bin"), "/usr/bin", "/bin"])
    return subprocess.run(
        [sys.executable, "-m", "apps.topk.submit", "partition=gpus", "ngpu=1", *words],
        cwd=folder, env={**clean, "PATH": path, "SLURM_JOB_ID": "1", **variables},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def hide_rsync(folder):
    rsync = folder / "bin" / "rsync"
    rsync.write_text("#!/bin/bash\nexit 1\n", encoding="utf-8")
    rsync.chmod(0o755)


@pytest.fixture
def root(tmp_path):
    """Our folders and a checkout beside them; an environment lies in the root."""
    copy_checkout(tmp_path / "checkout")
    (tmp_path / "root").mkdir()
    root = lay_out(tmp_path / "root")
    hide_rsync(root)
    link_ours(root, "apps", "lingua_topk")
    for name in (".venv/pyvenv.cfg", ".venv/lib/package.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "eval.yaml").write_text("{name: mine, validation: {context: 8}}", encoding="utf-8")
    return root


def on(root):
    checkout = str(root.parent / "checkout")
    return {"LINGUA_HOME": "../checkout", "LINGUA_ON_CPU": checkout, "PYTHONPATH": str(root)}


def test_from_a_checkout_with_our_folders_linked_in(tmp_path):
    checkout = lay_out(copy_checkout(tmp_path / "checkout"))
    hide_rsync(checkout)
    link_ours(checkout, "apps/topk", "lingua_topk")
    done = submit(checkout, "config=job.yaml", "launcher=bash", "time=60")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run = checkout / "runs" / "first"
    assert len(read_metrics(run)) == 4
    (start,) = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    assert start["host"].startswith(f"Meta Lingua at {run}/code.1, ")
    script = (run / "submit.slurm").read_text(encoding="utf-8")
    assert 'shell.bash hook)"\n' in script and f"cd {run}/code.1/\n" in script
    assert f"#SBATCH --output={run}/logs/%j.stdout\n" in script  # SLURM makes no folder
    assert "#SBATCH --time=60\n" in script and "#SBATCH --requeue\n" in script
    srun = script.index("\nsrun ")
    assert (
        script.index("\nunset ${!SLURM_CPU_BIND*} ")
        < script.index("\nexport SLURM_OVERLAP=1 ")
        < srun
    )
    again = submit(checkout, "config=job.yaml", "launcher=bash", "time=60")
    assert again.returncode == 2 and "exists: give another" in again.stderr


def test_a_sweep_from_our_root(root):
    words = ["sweep=[job.yaml]", "train.name=x", "launcher=bash", "time=60", "eval_time=60"]
    refused = submit(root, *words, "eval_config=eval.yaml", **on(root))
    assert refused.returncode == 2 and "train.name=x" in refused.stderr
    words[1] = "train.steps=3"
    done = submit(root, *words, "eval_config=eval.yaml", **on(root))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("first", "vanilla_first"):
        run = root / "runs" / name
        assert len(read_metrics(run)) == 3
        (start,) = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
        assert start["host"] == f"Meta Lingua at {root.parent}/checkout, commit unknown"
        results = json.loads((run / "evals/mine/validation.json").read_text(encoding="utf-8"))
        assert bool(results["provenance"]["model"]["topk"]) == (name == "first")
        assert 'shell.bash hook)"\n' in (run / "submit.slurm").read_text(encoding="utf-8")
    code = root / "runs/sweep/code"
    assert (code / "apps/topk/train.py").is_file() and not (code / ".venv").exists()


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"dump_dir": "runs/a b"}, [], "has a blank or"),
        ({}, ["nodes=0"], "nodes=0 is too small"),
        ({"model": {"topk": {"k": 0}}}, [], "model.topk.k=0 is too small"),
        ({"stepz": 1}, [], "stepz (in job.yaml) is no known key"),
    ],
)
def test_a_mistake_is_one_line(root, changes, words, said):
    config = OmegaConf.merge(OmegaConf.load(root / "job.yaml"), changes)
    OmegaConf.save(config, root / "job.yaml")
    done = submit(root, "config=job.yaml", "launcher=bash", "time=60", *words, **on(root))
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert not (root / "runs").exists()


def test_a_dry_run_writes_nothing(root):
    done = submit(root, "sweep=[job.yaml]", "dry_run=true", "eval_config=eval.yaml", **on(root))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('shell.bash hook)"\n') == 2 and "--array=0-1\n" in done.stdout
    assert done.stdout.count("\nunset ${!SLURM_CPU_BIND*} ") == 2
    assert "SLURM_OVERLAP" not in done.stdout
    assert "runs" not in [path.name for path in root.iterdir()]
