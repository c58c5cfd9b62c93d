"""The benchmark of decoding: what it writes, and that nothing incorrect is timed."""

import csv

import pytest
import torch

from apps.bench import decoding
from lingua_topk.errors import ConfigError
from lingua_topk.sparse import SparseDecoding, feed_forward, projections


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding, "CHECKED_TOKENS", 6)
    monkeypatch.setattr(decoding, "RESULTS", tmp_path)


def run(*arguments: str) -> list[dict]:
    shape = ("--dim=128", "--layers=4", "--vocab=60", "--k=4", "--prompt=5", "--tokens=3")
    return decoding.main([*shape, "--repeats=2", *arguments])


@pytest.mark.parametrize(
    "arguments", [(), ("--dtype=bf16", "--batch=2"), ("--site=mlp",)], ids=["fp32", "bf16", "mlp"]
)
def test_a_row_for_each_way(tmp_path, arguments):
    run("--save", *arguments)
    rows = list(csv.DictReader((tmp_path / "decoding.csv").open(encoding="utf-8")))
    assert [row["what"] for row in rows] == ["dense", "sparse", "transformers"]
    assert all(row["microseconds"] == "" for row in rows)  # of a GPU only
    assert all(float(row["ratio"]) > 0 for row in rows)
    assert (rows[0]["ratio"], rows[2]["over_transformers"]) == ("1.0", "1.0")
    assert [row["saving"] != "" for row in rows] == [False, True, False]
    assert all(row["torch"] == torch.__version__ and float(row["ceiling"]) > 1 for row in rows)


@pytest.mark.parametrize(
    ("site", "part", "name"),
    [("residual", projections, "gathered"), ("mlp", feed_forward, "gathered_gate")],
)
def test_what_is_not_correct_is_not_reported(monkeypatch, tmp_path, site, part, name):
    """Which shows too that the model of the check does gather."""
    right = getattr(part, name)
    monkeypatch.setattr(part, name, lambda *inputs: -right(*inputs))
    with pytest.raises(RuntimeError, match="sparse: a text in float64 is not that of dense"):
        run("--save", f"--site={site}")
    assert not list(tmp_path.iterdir())


def test_transformers_must_agree_too(monkeypatch):
    right = decoding._exported

    def broken(model):
        theirs = right(model)
        theirs.lm_head.weight = torch.nn.Parameter(-theirs.lm_head.weight, requires_grad=False)
        return theirs

    monkeypatch.setattr(decoding, "_exported", broken)
    with pytest.raises(RuntimeError, match="transformers: a text in float64"):
        run()


def model_of(site, k=4, layers=4):
    return decoding._model(128, layers, 60, k, site, torch.float32, "cpu", 8)


def test_the_exported_model_lies_on_the_same_memory():
    model = model_of("residual")
    theirs = decoding._exported(model)
    assert theirs.model.layers[1].mlp.up_proj.weight.data_ptr() == (
        model.layers[1].feed_forward.w3.weight.data_ptr()
    )


def test_what_a_text_costs_once_is_not_counted():
    """Tokens of 1, 2, 4, 8 and 16 seconds."""
    times = [1.0, 3.0, 7.0, 15.0, 31.0]
    ways = {"one": lambda prompts, tokens: ([[0]], times)}
    assert decoding._in_turns(ways, [[0]], 5, 2, 2)[0].tolist() == [[28 / 3]] * 2
    assert decoding._in_turns(ways, [[0]], 5, 1, 4)[0].tolist() == [[16.0]]


def test_what_the_bytes_allow():
    width, hidden, vocab = 128, 512, 60
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    read = 4 * block + width * vocab + width
    # Two blocks behind TopK layers, of four whose last two have none.
    saved = 2 * 3 * width * (width - 4)
    assert decoding.byte_ceiling(model_of("residual"), 1) == pytest.approx(read / (read - saved))
    saved = 2 * 3 * width * (width - 8)
    assert decoding.byte_ceiling(model_of("residual"), 2) == pytest.approx(read / (read - saved))
    saved = 2 * 2 * width * (hidden - 4)
    assert decoding.byte_ceiling(model_of("mlp"), 1) == pytest.approx(read / (read - saved))
    assert decoding.byte_ceiling(model_of("residual", k=200), 1) == 1.0
    assert SparseDecoding(model_of("residual")).layers == [1, 2]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--device=tpu", "device='tpu' is not known: choose cpu or cuda"),
        ("--dtype=int8", "dtype='int8' is not known"),
        ("--site=both", "site='both' is not known: choose residual or mlp"),
        ("--dim=100", "dim=100 is not allowed: give a multiple of 128"),
        ("--tokens=2", "tokens=2 is too small: give at least 3"),
        ("--layers=2", "layers=2 is too small: give at least 3"),
    ],
)
def test_refused_arguments(argument, message):
    with pytest.raises(ConfigError, match=message):
        decoding.main([argument])
