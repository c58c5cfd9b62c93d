"""The quickstart with a model that trains in a second, and is steered for a few."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from apps.topk import cli, quickstart
from apps.topk.neurons.folder import read_layers
from lingua_topk.report.page import MARK
from tests.apps.hostile import undisturbed

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
STEERING = {"n": 2, "candidates": 16, "deltas": "1,4", "num_prompts": 4, "max_tokens": 12}


def words(folder, *arguments):
    here = [f"data.root_dir={folder}/data", f"dump_dir={folder}/dumps"]
    return [*TINY, *here, f"data.tokenizer.path={folder}/data/tokenizer.model", *arguments]


def said(folder):
    """What it prints. Its trainings are processes of their own, as ever."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, undisturbed(), redirect_stdout(out):
        patch.chdir(ROOT)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(quickstart, "STEERING", STEERING)
        quickstart.main(words(folder))
    return out.getvalue()


@pytest.fixture
def assert_refused(monkeypatch, capsys):
    def assert_refused(folder, argument, message):
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: quickstart.main(words(folder, argument)))
        told = capsys.readouterr().err
        assert ended.value.code == 2
        assert message in told and len(told.splitlines()) == 1

    return assert_refused


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, said(folder)


@pytest.mark.slow
def test_it_ends_with_the_table(first):
    folder, text = first
    table = text[text.index("with differences to vanilla") :]
    for name in ("topk", "vanilla"):
        evals = folder / f"dumps/{name}/evals/0000000003"
        validation = json.loads((evals / "validation.json").read_text())["python-docs"]
        results = json.loads((evals / "results.json").read_text())["results"]
        assert validation["documents"] == 3
        # The table rounds by the standard error.
        assert f"{int(validation['perplexity']):,}"[:4] in table
        assert f"{100 * results['python_docs_continuation']['acc,none']:.0f}" in table
    assert "│ L0 " in table and "│ k " in table
    assert "What to try next" in text
    written = (folder / "dumps/table.md").read_text(encoding="utf-8")
    assert "python_docs_last_word" in written and (folder / "dumps/table.csv").is_file()


@pytest.mark.slow
def test_it_ends_with_the_report_and_a_few_neurons(first):
    folder, text = first
    end = text[text.index("reading the neurons") :]
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
    folder, text = first
    content = json.loads((folder / "dumps/topk/steering/steering.json").read_text())
    rows = [row for row in content["rows"] if row["method"] == "neuron" and row["chosen"]]
    best = max(rows, key=lambda row: row["choosing"]["score"])
    shown = text[text.index(f"steering neuron {best['concept']} (") :]
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
    folder, text = first
    again = said(folder)
    assert "is there and is used" in again
    assert again.count("nothing to do") == 2
    assert again.splitlines()[-25:] == text.splitlines()[-25:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=4", "steps=4, but it is 3 in the run that is in"),
        ("model.topk.k=8", "model.topk.k=8, but it is 24 in the run that is in"),
        ("optim.lr=0.5", "optim.lr=0.5, but it is 0.002 in the run that is in"),
    ],
)
def test_other_keys_than_those_of_the_runs_that_are_there_are_refused(
    first, assert_refused, argument, message
):
    assert_refused(first[0], argument, message)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stepz=3", "stepz (in the command line) is no known key"),
        ("model.topk=null", "model.topk and eval cannot be null here"),
        ("model.topk.k=0", "model.topk.k=0 is too small"),
        ("eval=null", "model.topk and eval cannot be null here"),
    ],
)
def test_a_mistake_ends_it_before_any_work(tmp_path, assert_refused, argument, message):
    assert_refused(tmp_path, argument, message)
    assert not list(tmp_path.iterdir())


def test_it_is_a_program():
    command = [sys.executable, "-m", quickstart.PROGRAM, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{quickstart.HELP}\n"
