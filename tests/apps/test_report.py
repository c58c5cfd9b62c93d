"""The report of a real run: what the program reads, what it writes, what it refuses."""

import re
import shutil

import numpy as np
import pytest
import torch

from apps.topk import analyze, cli, report
from apps.topk.checkpoint import checkpoint_folder, open_checkpoint
from apps.topk.neurons.folder import read_analysis
from apps.topk.neurons.page_data import recorded_texts, strongest_firings
from apps.topk.neurons.reading_texts import read_texts
from lingua_topk.analysis.recording import open_recording
from lingua_topk.report.data import Firings
from lingua_topk.report.page import MARK
from tests.apps.real_text import train_on, write_stories
from tests.report import made_up_steering
from tests.report.test_page import chunks_of

FEW = ["--tokens", "3000", "--min_words", "3", "--contexts", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The dump_dir of a run whose neurons were analysed."""
    root = write_stories(tmp_path_factory.mktemp("report"))
    train_on(root, root / "topk", "steps=30")
    analyze.main(["--ckpt", str(root / "topk"), "--quiet", *FEW])
    return root / "topk"


def mistake(capsys, *argv) -> str:
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: report.main([str(one) for one in argv]))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[-1].startswith("error: ")
    return said[-1]


def test_a_run_becomes_one_file_with_the_texts_that_were_given(run, tmp_path, capsys):
    more, out = tmp_path / "more.txt", tmp_path / "report.html"
    more.write_text("\ufeffone line, with a comma\r\n\n--another\n", encoding="utf-8")
    report.main(["--run", str(run), "--out", str(out), "--text", "a, b", "--text=--c",
                 "--texts", str(more), "--rows", "3", "--device", "cpu"])  # fmt: skip
    assert str(out) in capsys.readouterr().out
    html = out.read_text(encoding="utf-8")
    assert html.startswith(MARK)
    assert not [one for one in tmp_path.iterdir() if one not in (out, more)]
    chunks = chunks_of(html)
    pieces = chunks["table"][1]["pieces"]
    tokens = chunks["texts"][0]["tokens"]
    spelled = "".join(p if isinstance(p, str) else "|" for p in (pieces[t] for t in tokens))
    assert spelled.startswith("|a, b|--c|one line, with a comma|--another|")
    assert [name for name in chunks if name.startswith("text-")] == [f"text-{i}" for i in range(7)]
    width = open_recording(run / "neurons/model/recording").width
    assert len(chunks["table"][0]["dead"]) == 3 * width


def test_an_analysis_folder_and_a_run_give_the_same_and_ours_is_replaced(run, tmp_path, capsys):
    out = tmp_path / "report.html"
    report.report(run=str(run), out=str(out), rows=1)
    first = out.read_bytes()
    report.report(run=str(run / "neurons"), out=str(out), rows=1)
    assert out.read_bytes() == first


def test_what_fires_on_a_given_text_is_what_the_model_computes(run):
    checkpoint = open_checkpoint(checkpoint_folder(str(run)))
    model, tokenizer = checkpoint.model("cpu", torch.float32), checkpoint.tokenizer()
    outputs = {}
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda _, __, y, i=i: outputs.update({i: y[0].numpy()}))
    (text,) = read_texts(model, tokenizer, ["she saw the old house"], [0, 2], 6, 4, True)
    assert text.tokens[0] == tokenizer.bos_id
    assert sorted(text.firings) == [0, 2]
    for layer, found in text.firings.items():
        y = outputs[layer]
        np.testing.assert_array_equal(y[found.positions, found.neurons], found.values)
        for position in range(len(text.tokens)):
            kept = np.abs(found.values[found.positions == position])
            largest = np.sort(np.abs(y[position]))[::-1][:4]
            np.testing.assert_array_equal(kept, largest[largest > 0])


def test_recorded_texts_hold_the_strongest_of_each_token(run):
    recording = open_recording(run / "neurons/model/recording")
    texts = recorded_texts(recording, 3, 2)
    last = len(recording.tokens) - 1
    assert [text.row for text in texts] == [0, round(last / 2), last]
    length = recording.tokens.shape[1]
    for layer in recording.layers:
        dense = np.zeros((recording.n_tokens, recording.width), np.float32)
        for i in range(recording.width):
            places, values = recording.layer(layer).neuron(i)
            dense[places, i] = values
        for text in texts:
            y, found = dense[text.row * length :][:length], text.firings[layer]
            np.testing.assert_array_equal(y[found.positions, found.neurons], found.values)
            assert np.bincount(found.positions, minlength=length).tolist() == [
                min(2, np.count_nonzero(row)) for row in y
            ]
            for position in range(length):
                kept = np.abs(found.values[found.positions == position])
                largest = np.sort(np.abs(y[position]))[::-1][:2]
                np.testing.assert_array_equal(kept, largest[largest > 0])


def test_the_strongest_are_those_of_largest_magnitude():
    found = Firings(np.array([1, 0, 1, 1]), np.array([5, 6, 7, 8]), np.array([1.0, -2, -3, 2]))
    kept = strongest_firings(found, 2)
    assert kept.positions.tolist() == [0, 1, 1]
    assert kept.neurons.tolist() == [6, 7, 8]


def test_another_file_is_not_replaced(run, tmp_path, capsys):
    out = tmp_path / "mine.html"
    out.write_text("<!doctype html>\n<p>mine", encoding="utf-8")
    assert "is no report of this program" in mistake(capsys, "--run", run, "--out", out)
    assert out.read_text(encoding="utf-8").endswith("mine")
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "nowhere")
    assert "is no report of this program" in mistake(capsys, "--run", run, "--out", link)


def test_mistakes_are_one_line(run, tmp_path, capsys):
    out = ["--out", tmp_path / "r.html"]
    said = mistake(capsys, "--run", tmp_path, *out)
    assert "holds no finished analysis" in said and "apps.topk.analyze" in said
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"\xe9")
    for argv, words in (
        (["--out", tmp_path / "r.txt"], "does not end in .html"),
        (["--out", tmp_path / "r.html", "--rows", "-1"], "rows=-1"),
        ([*out, "--strongest", "0"], "strongest=0"),
        ([*out, "--contexts", "0"], "contexts=0"),
        ([*out, "--dtype", "int8"], "dtype='int8'"),
        ([*out, "--texts", tmp_path / "none"], "texts="),
        ([*out, "--texts", latin], "is not UTF-8"),
        ([*out, "--text"], "--text needs a value"),
        ([*out, "--text", "x " * 9000, "--device", "cpu"], "tokens: give at most"),
        ([*out, "--ckpt", tmp_path], "ckpt_dir="),
        ([*out, "--nothing", "1"], "--nothing"),
    ):
        assert words in mistake(capsys, "--run", run, *argv), argv
    assert not (tmp_path / "r.html").exists()


def test_an_analysis_that_is_damaged_is_refused(run, tmp_path, capsys):
    for name, words in (
        ("model/layers/01.safetensors", "is no layer of an analysis"),
        ("model/words/01.jsonl", "is no layer of an analysis"),
        ("model/recording/recording.json", "recording"),
        ("comparison.json", "cannot be read"),
        ("entropy.svg", "no SVG"),
    ):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(run / "neurons", copy)
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
        said = mistake(capsys, "--run", copy, "--ckpt", run, "--out", tmp_path / "r.html")
        assert words in said, name
    (tmp_path / "gone").mkdir()
    copy = tmp_path / "gone/neurons"
    shutil.copytree(run / "neurons", copy)
    (copy / "model/layers/01.safetensors").unlink()
    assert "are there" in mistake(
        capsys, "--run", copy, "--ckpt", run, "--out", tmp_path / "r.html"
    )
    text = (copy / "model/recording/recording.json").read_text(encoding="utf-8")
    (copy / "model/recording/recording.json").write_text(
        re.sub(r'"model_name": "[^"]+"', '"model_name": "/nowhere/checkpoints/1"', text),
        encoding="utf-8",
    )
    assert "give --ckpt" in mistake(capsys, "--run", copy, "--out", tmp_path / "r.html")


def test_steering_is_shown_where_it_lies_beside_the_analysis(run, tmp_path, capsys):
    shutil.copytree(run / "neurons", tmp_path / "neurons")
    about = read_analysis(tmp_path / "neurons")
    out = tmp_path / "r.html"
    arguments = {"run": str(tmp_path), "out": str(out), "ckpt": str(run), "rows": 1}
    report.report(**arguments)
    assert "steering" not in chunks_of(out.read_text(encoding="utf-8"))
    same = {"checkpoint": about["checkpoint"], "step": about["step"]}
    made_up_steering.write(tmp_path / "steering", **same)
    report.report(**arguments)
    html = out.read_text(encoding="utf-8")
    assert [one["name"] for one in chunks_of(html)["steering"][1]["concepts"]] == ["0:7", "0:9"]
    assert 'id="view-steering"' in html
    made_up_steering.write(tmp_path / "steering", **{**same, "step": 1})
    said = mistake(capsys, "--run", tmp_path, "--ckpt", run, "--out", out)
    assert "steering.json" in said and "of step 1," in said
    assert out.read_text(encoding="utf-8") == html


def test_help_lists_the_flags(capsys):
    report.main(["--run", "x", "--text", "y", "--help"])
    said = capsys.readouterr().out
    for name in ("--run", "--text ", "--texts", "--strongest", "--ckpt"):
        assert name in said
