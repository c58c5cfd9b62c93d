"""The quickstart as a newcomer starts it, with a model that trains in a second."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apps.topk.neurons.folder import read_layers
from lingua_topk.report.page import MARK

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "steps=3",
    "model.dim=32",
    "model.n_heads=2",
    "model.n_layers=3",
    "data.batch_size=1",
    "data.seq_len=64",
]
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
    table = done.stdout[done.stdout.index("with differences to vanilla") :]
    for name in ("topk", "vanilla"):
        evals = folder / f"dumps/{name}/evals/0000000003"
        validation = json.loads((evals / "validation.json").read_text())["python-docs"]
        results = json.loads((evals / "results.json").read_text())["results"]
        assert validation["documents"] == 3
        # The table rounds by the standard error.
        assert f"{int(validation['perplexity']):,}"[:4] in table
        assert f"{100 * results['python_docs_continuation']['acc,none']:.0f}" in table
    assert "│ L0 " in table and "│ k " in table
    assert "What to try next" in done.stdout
    written = (folder / "dumps/table.md").read_text(encoding="utf-8")
    assert "python_docs_last_word" in written and (folder / "dumps/table.csv").is_file()


@pytest.mark.slow
def test_it_ends_with_the_report_and_a_few_neurons(first):
    folder, done = first
    end = done.stdout[done.stdout.index("reading the neurons") :]
    shown = end[end.index("neurons with the lowest semantic entropy") :].splitlines()
    lowest = [line.split() for line in shown[1:4]]
    layers = read_layers(folder / "dumps/topk/neurons/model")
    entropies = layers[0].arrays["semantic_entropy"]  # the one layer of three that has TopK
    expected = sorted(entropies[np.isfinite(entropies)])[:3]
    assert [float(words[1]) for words in lowest] == pytest.approx(expected, rel=1e-2)
    layer, neuron = map(int, lowest[0][0].split(":"))
    assert layer == 0 and lowest[0][3].rstrip(",") == layers[0].words[neuron][0][0]
    assert shown[4].startswith("neurons with the highest MonoScore")
    assert shown[-1].startswith(f"written: {folder}/dumps/report.html")
    assert (folder / "dumps/report.html").read_text(encoding="utf-8").startswith(MARK)


@pytest.mark.slow
def test_it_shows_one_steered_example_that_it_chose(first):
    folder, done = first
    content = json.loads((folder / "dumps/topk/steering/steering.json").read_text())
    rows = [row for row in content["rows"] if row["method"] == "neuron" and row["chosen"]]
    best = max(rows, key=lambda row: row["choosing"]["score"])
    shown = done.stdout[done.stdout.index(f"steering neuron {best['concept']} (") :]
    assert f"by {best['delta']:g} times its" in shown
    assert "unsteered" in shown and f"over {best['reported']['tokens']} tokens" in shown
    page = (folder / "dumps/report.html").read_text(encoding="utf-8")
    assert 'id="view-steering"' in page


@pytest.mark.slow
def test_the_models_differ_in_topk_alone(first):
    folder, _ = first
    params = [
        json.loads((folder / f"dumps/{name}/checkpoints/0000000003/params.json").read_text())
        for name in ("topk", "vanilla")
    ]
    for one in params:
        one.pop("name"), one.pop("dump_dir"), one["checkpoint"].pop("path")
    assert params[0]["model"].pop("topk")["k"] == 24 and params[1]["model"].pop("topk") is None
    assert params[0] == params[1]


@pytest.mark.slow
def test_a_second_run_uses_what_is_there(first):
    folder, done = first
    again = quickstart(folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is there and is used" in again.stdout
    assert again.stdout.count("nothing to do") == 2
    assert again.stdout.splitlines()[-25:] == done.stdout.splitlines()[-25:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=4", "steps=4, but it is 3 in the run that is in"),
        ("model.topk.k=8", "model.topk.k=8, but it is 24 in the run that is in"),
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
