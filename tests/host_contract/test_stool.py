"""Lingua's own stool submits apps.topk, from a checkout and from our root.

It copies with rsync and starts with srun: the first must be there, the second is a stand-in that
starts one process, with CUDA and NCCL answered by the CPU and gloo. By torchrun, which finds a
free port, where Lingua alone always takes the same.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.apps.tiny import CONFIG, read_metrics, write_corpus

ROOT = Path(__file__).resolve().parents[2]
HOME = os.environ.get("LINGUA_HOME", "")
pytestmark = [
    pytest.mark.skipif(not HOME, reason="LINGUA_HOME names no checkout of Meta Lingua"),
    pytest.mark.skipif(not shutil.which("rsync"), reason="Lingua's stool copies with rsync"),
]

LAUNCHER = Path(__file__).with_name("lingua_on_cpu.py")
SRUN = f"""#!/bin/bash
while [[ "$1" == -* ]]; do shift 2; done
[[ "$1 $2" == "python -u" ]] || exit 9
exec python -m torch.distributed.run --standalone --nproc-per-node=1 {LAUNCHER} "${{@:3}}"
"""
JOB = "{name: tiny, dump_dir: runs/first, steps: 4, data: {root_dir: .}}"


def lay_out(folder):
    """The data and the job's config, paths relative to `folder`, and the stand-in for srun."""
    write_corpus(folder)
    config = OmegaConf.merge(OmegaConf.create(CONFIG), OmegaConf.create(JOB))
    OmegaConf.save(config, folder / "job.yaml")
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(SRUN, encoding="utf-8")
    (folder / "bin" / "srun").chmod(0o755)
    return folder


def copy_checkout(folder):
    shutil.copytree(HOME, folder, ignore=shutil.ignore_patterns(".git", "topk", "lingua_topk"))
    return folder


def link_ours(folder, *names):
    for name in names:
        (folder / name).symlink_to(ROOT / name)


def submit(folder, **variables):
    """What the command says, in an environment that is activated, as one is before submitting."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LINGUA_", "SLURM_"))}
    path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    words = ["script=apps.topk.train", "config=job.yaml", "nodes=1", "ngpu=1", "partition=gpus"]
    done = subprocess.run(
        [sys.executable, "-m", "lingua.stool", *words, "time=60", "launcher=bash"],
        cwd=folder, env={**clean, "PATH": os.pathsep.join(path), **variables},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    # Lingua drops the launcher's status; the run tells.
    run = folder / "runs" / "first"
    assert (run / "provenance.json").is_file(), done.stdout[-2000:] + done.stderr[-3000:]
    assert [line["global_step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    (start,) = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    return start["host"]


def test_from_a_checkout_with_our_folders_linked_in(tmp_path):
    """All that runs is in the copy, Lingua and ours."""
    checkout = lay_out(copy_checkout(tmp_path / "checkout"))
    link_ours(checkout, "apps/topk", "lingua_topk")
    assert submit(checkout) == f"Meta Lingua at {checkout}/runs/first/code, commit unknown"
    for name in ("lingua/stool.py", "apps/topk/train.py", "lingua_topk/patch.py"):
        copied = checkout / "runs/first/code" / name
        assert copied.is_file() and not copied.is_symlink()


def test_from_our_root_with_a_checkout_beside_it(tmp_path):
    """LINGUA_HOME is relative, and an environment lies in the root, whose files stool copies."""
    checkout = copy_checkout(tmp_path / "checkout")
    root = tmp_path / "root"
    root.mkdir()
    lay_out(root)
    link_ours(root, "apps", "lingua_topk")
    package = root / ".venv" / "lib" / "lingua" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("raise ImportError\n", encoding="utf-8")
    described = submit(
        root, PYTHONPATH=str(checkout), LINGUA_HOME="../checkout", LINGUA_ON_CPU=str(checkout)
    )
    assert described == f"Meta Lingua at {checkout}, commit unknown"
    assert (root / "runs/first/code/.venv/lib/lingua/__init__.py").is_file()
