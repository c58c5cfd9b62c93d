"""The quickstart as a newcomer starts it, with a model that trains in a second."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apps.topk.quickstart import comparison

ROOT = Path(__file__).resolve().parents[2]
TINY = ["steps=3", "model.dim=32", "model.n_layers=3", "data.batch_size=1", "data.seq_len=64"]
TINY += ["data.prefetch_size=4", "optim.warmup=1", "eval.validation.max_documents=3"]


def quickstart(folder, *arguments):
    command = [sys.executable, "-m", "apps.topk.quickstart", *TINY]
    command += [f"data.root_dir={folder}/data", f"dump_dir={folder}/dumps"]
    command += [f"data.tokenizer.path={folder}/data/tokenizer.model", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, quickstart(folder)


@pytest.mark.slow
def test_it_ends_with_the_table(first):
    folder, done = first
    assert done.returncode == 0, done.stderr[-3000:]
    *_, title, _, _, _, topk, vanilla, _ = done.stdout.splitlines()
    assert "held-out python-docs: 3 documents" in title
    results = {
        name: json.loads((folder / f"dumps/{name}/evals/0000000003/validation.json").read_text())
        for name in ("topk", "vanilla")
    }
    for row, name in ((topk, "topk"), (vanilla, "vanilla")):
        assert name in row and f"{results[name]['python-docs']['perplexity']:.2f}" in row
    assert "32 of 32" in topk and results["topk"]["python-docs"]["l0"]
    assert "What to try next" in done.stdout


@pytest.mark.slow
def test_the_models_differ_in_topk_alone(first):
    folder, _ = first
    params = [
        json.loads((folder / f"dumps/{name}/checkpoints/0000000003/params.json").read_text())
        for name in ("topk", "vanilla")
    ]
    for one in params:
        one.pop("name"), one.pop("dump_dir"), one["checkpoint"].pop("path")
    assert params[0]["model"].pop("topk")["k"] == 32 and params[1]["model"].pop("topk") is None
    assert params[0] == params[1]


@pytest.mark.slow
def test_a_second_run_uses_what_is_there(first):
    folder, done = first
    again = quickstart(folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is there and is used" in again.stdout
    assert again.stdout.count("nothing to do") == 2
    assert again.stdout.splitlines()[-7:] == done.stdout.splitlines()[-7:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=4", "steps=4, but it is 3 in the run that is in"),
        ("model.topk.k=8", "model.topk.k=8, but it is 32 in the run that is in"),
        ("optim.lr=0.5", "optim.lr=0.5, but it is 0.002 in the run that is in"),
    ],
)
def test_other_keys_than_those_of_the_runs_that_are_there_are_refused(first, argument, message):
    folder, _ = first
    done = quickstart(folder, argument)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stepz=3", "stepz (in the command line) is no known key"),
        ("model.topk=null", "model.topk and eval cannot be null here"),
        ("model.topk.k=0", "model.topk.k=0 is too small"),
        ("eval=null", "model.topk and eval cannot be null here"),
    ],
)
def test_a_mistake_ends_it_before_any_work(tmp_path, argument, message):
    done = quickstart(tmp_path, argument)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_table_of_runs_without_an_evaluation_says_what_to_do(first, tmp_path):
    folder, _ = first
    (folder / "dumps/vanilla/evals").rename(folder / "dumps/vanilla/moved")
    runs = {name: folder / "dumps" / name for name in ("topk", "vanilla")}
    with pytest.raises(Exception, match="and it is written anew"):
        comparison(runs)
