"""An analysis through the program: against the plain dense computation, stopped, and refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from apps.topk import analyze, cli
from apps.topk.checkpoint import checkpoint_folder, open_checkpoint
from apps.topk.corpus.tokenizer import train_tokenizer
from apps.topk.neurons import analysis as analysis_module
from apps.topk.neurons import folder
from lingua_topk.analysis.neurons import entropy
from lingua_topk.analysis.recording import open_recording
from tests.apps.real_text import SEQ_LEN, train_on, write_stories

FEW = ["--tokens", "3000", "--min_words", "3", "--contexts", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The dump_dirs of a TopK run and its twin."""
    root = write_stories(tmp_path_factory.mktemp("analyze"))
    for name, overrides in {"topk": [], "twin": ["model.topk=null"]}.items():
        train_on(root, root / name, "steps=30", *overrides)
    return root


@pytest.fixture(scope="module")
def analysed(runs):
    """A whole analysis with the twin."""
    out = runs / "analysed"
    analyze.main(["--ckpt", str(runs / "topk"), "--twin", str(runs / "twin"), *FEW,
                  "--out", str(out)])  # fmt: skip
    return out


def mistake(capsys, *argv) -> str:
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: analyze.main([str(one) for one in argv]))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[-1].startswith("error: ")
    return said[-1]


def dense_outputs(runs, name, tokens):
    """What each block of a run gives on the rows, float32 [N * S, D] by layer, by hooks."""
    checkpoint = open_checkpoint(checkpoint_folder(str(runs / name)))
    model = checkpoint.model("cpu", torch.float32)
    found: dict[int, torch.Tensor] = {}
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda _, __, y, i=i: found.update({i: y}))
    with torch.inference_mode():
        model(torch.from_numpy(tokens).long())
    return {i: y.flatten(0, 1).numpy() for i, y in found.items()}, model


def test_the_measures_are_those_of_the_dense_computation(runs, analysed):
    recording = open_recording(analysed / "model" / "recording")
    tokens = recording.tokens
    outputs, model = dense_outputs(runs, "topk", tokens)
    vocab_size, flat = model.output.weight.shape[0], tokens.reshape(-1)
    by_layer = {one.index: one for one in folder.read_layers(analysed / "model")}
    assert list(by_layer) == [0, 1, 2]
    for i in (0, 1):  # with TopK: every value that is not 0
        arrays, y = by_layer[i].arrays, outputs[i]
        assert by_layer[i].is_topk and by_layer[i].kept == "survivors"
        np.testing.assert_array_equal(arrays["counts"], (y != 0).sum(0))
        np.testing.assert_allclose(arrays["firing_rate"], (y != 0).mean(0))
        np.testing.assert_allclose(arrays["maximum"], np.abs(y).max(0), rtol=1e-5)
        mass = np.stack([np.bincount(flat, np.abs(y[:, n]), vocab_size) for n in range(32)])
        expected = [entropy(one) for one in mass]
        np.testing.assert_allclose(arrays["token_entropy"], expected, atol=1e-5)
        normalised = np.array(expected) / np.log2(vocab_size)
        np.testing.assert_allclose(arrays["token_entropy_normalised"], normalised, atol=1e-5)


def test_layers_without_topk_in_both_models_keep_the_k_largest(runs, analysed):
    tokens = open_recording(analysed / "model" / "recording").tokens
    for part, run in (("model", "topk"), ("twin", "twin")):
        outputs, _ = dense_outputs(runs, run, tokens)
        (layer,) = folder.read_layers(analysed / part)[2:]
        check_largest(layer, outputs[2])


def check_largest(layer, y):
    assert not layer.is_topk and layer.kept == "the 4 largest by magnitude"
    size = np.abs(y)
    kept = size >= np.sort(size, axis=1)[:, -4:-3]
    np.testing.assert_array_equal(layer.arrays["counts"], kept.sum(0))


def test_the_twin_is_read_by_the_selection_of_the_model(runs, analysed):
    """Where the model has TopK: a neuron of either then stands for what makes it positive."""
    tokens = open_recording(analysed / "model" / "recording").tokens
    outputs, _ = dense_outputs(runs, "twin", tokens)
    for layer in folder.read_layers(analysed / "twin")[:2]:
        y = outputs[layer.index]
        kept = (y >= np.sort(y, axis=1)[:, -4:-3]) & (y > 0)
        assert not layer.is_topk and layer.kept == "what the model's selection would leave"
        np.testing.assert_array_equal(layer.arrays["counts"], kept.sum(0))
        expected = np.where(kept, y, 0).max(0)
        np.testing.assert_allclose(layer.arrays["maximum"], expected, rtol=1e-5)


def test_the_twin_can_be_read_by_magnitude(runs, tmp_path):
    analyze.main(["--ckpt", str(runs / "topk"), "--twin", str(runs / "twin"), *FEW, "--layers", "0",
                  "--out", str(tmp_path / "out"), "--twin_values", "largest",
                  "--quiet"])  # fmt: skip
    tokens = open_recording(tmp_path / "out" / "model" / "recording").tokens
    (layer,) = folder.read_layers(tmp_path / "out" / "twin")
    check_largest(layer, dense_outputs(runs, "twin", tokens)[0][0])


def test_the_control_is_the_same_firings_on_shuffled_tokens(analysed):
    """Trained or not, the values alone say nothing of tokens: more entropy, up to log2 of their
    number."""
    for one in folder.read_layers(analysed / "model"):
        arrays = one.arrays
        fires = arrays["counts"] > 0
        shuffled = arrays["shuffled_token_entropy"]
        assert (np.isnan(shuffled) == ~fires).all()
        assert (shuffled[fires] <= np.log2(arrays["counts"][fires]) + 1e-9).all()
        often = arrays["counts"] > 200
        assert np.median(shuffled[often] - arrays["token_entropy"][often]) > 0


def random_counts(runs, out, seed):
    analyze.main(["--ckpt", str(runs / "topk"), *FEW, "--layers", "0", "--out", str(out),
                  "--seed", str(seed), "--quiet"])  # fmt: skip
    return folder.read_layers(out / "random")[0].arrays["counts"].tolist()


def test_the_random_weights_are_not_the_models_and_come_from_the_seed(analysed, runs, tmp_path):
    random = {one.index: one.arrays for one in folder.read_layers(analysed / "random")}
    model = {one.index: one.arrays for one in folder.read_layers(analysed / "model")}
    assert random.keys() == model.keys()
    assert not np.array_equal(random[0]["counts"], model[0]["counts"])
    assert random_counts(runs, tmp_path / "same", 0) == random[0]["counts"].tolist()
    assert random_counts(runs, tmp_path / "other", 1) != random[0]["counts"].tolist()
    assert not (analysed / "random" / "recording").exists()


def test_contexts_hold_what_the_recording_says(analysed):
    recording = open_recording(analysed / "model" / "recording")
    arrays = folder.read_layers(analysed / "model")[0].arrays
    neuron = int(np.argmax(arrays["counts"]))
    places, values = recording.layer(0).neuron(neuron)
    row, position = (int(arrays[f"context_{name}"][neuron, 0]) for name in ("rows", "positions"))
    peak = values[places == row * SEQ_LEN + position]
    assert abs(peak[0]) == pytest.approx(arrays["maximum"][neuron])
    start = arrays["context_starts"][neuron, 0]
    assert arrays["context_values"][neuron, 0, position - start] == peak[0]


def test_it_says_what_it_was_made_from(analysed, runs):
    content = folder.read_analysis(analysed)
    assert content["parts"] == ["model", "random", "twin", "random_twin"]
    assert content["corpus"]["tokens"] == 3000 // SEQ_LEN * SEQ_LEN
    assert content["corpus"]["sources"]["text"] > 0
    assert "circular" in content["vectors"]
    assert content["settings"]["threshold"] == 0.5
    assert content["checkpoint"]["topk"]["k"] == 4
    compared = json.loads((analysed / "comparison.json").read_text())
    assert compared["untrained"]["pairs"] >= 10
    assert any(line.endswith("so much is there before any training.")
               for line in compared["conclusion"])  # fmt: skip
    assert (analysed / "comparison.md").is_file() and (analysed / "entropy.svg").is_file()


def test_a_second_run_works_on_nothing(analysed, runs, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in analysed.rglob("*.safetensors")}
    monkeypatch.setattr(analysis_module, "measure_layer", None)
    analyze.main(["--ckpt", str(runs / "topk"), "--twin", str(runs / "twin"), *FEW,
                  "--out", str(analysed)])  # fmt: skip
    assert before == {path: path.stat().st_mtime_ns for path in analysed.rglob("*.safetensors")}


def test_a_run_that_was_stopped_goes_on(analysed, runs, tmp_path, monkeypatch):
    argv = ["--ckpt", str(runs / "topk"), "--twin", str(runs / "twin"), *FEW,
            "--out", str(tmp_path / "out")]  # fmt: skip
    measured = []

    def stops(layer, *rest):
        if len(measured) == 4:  # the model's three, and one of the random weights
            raise KeyboardInterrupt
        measured.append(layer.index)
        return analyse(layer, *rest)

    analyse = analysis_module.measure_layer
    monkeypatch.setattr(analysis_module, "measure_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        analyze.main(argv)
    assert not (tmp_path / "out" / folder.DONE_NAME).exists()
    measured.clear()
    monkeypatch.setattr(
        analysis_module, "measure_layer", lambda *a: measured.append(1) or analyse(*a)
    )
    analyze.main(argv)
    assert len(measured) == 8
    for path in analysed.rglob("layers/*.safetensors"):
        ours, theirs = (load_file(one / path.relative_to(analysed))
                        for one in (tmp_path / "out", analysed))  # fmt: skip
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--tokens", "50"], r"tokens=50 is too few: give at least 768"),
        (["--layers", "0,9"], r"layers='0,9' is not allowed: give numbers from 0 to 2"),
        (["--k", "-2"], r"k=-2 is not allowed"),
        (["--threshold", "1"], r"threshold=1.0 is not allowed"),
        (["--min_words", "1"], r"min_words=1 is too small"),
        (["--max_words", "2"], r"max_words=2 is less than min_words=10"),
        (["--row_length", "1000"], r"row_length=1000 is not allowed: give 2 to 96"),
        (["--data", "nowhere"], r"nowhere is neither a file nor a folder"),
        (["--vectors", "nowhere"], r"vectors='nowhere' is not there"),
        (["--seed", "-1"], r"seed=-1 is not allowed"),
        (["--dtype", "int8"], r"dtype='int8' is not known"),
        (["--device", "tpu"], r"device='tpu' is not known"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_named_and_nothing_is_written(runs, tmp_path, capsys, argv, said):
    import re

    out = tmp_path / "out"
    line = mistake(capsys, "--ckpt", runs / "topk", "--out", out, *argv)
    assert re.search(said, line), line
    assert not out.exists()


def test_a_small_or_empty_corpus_is_refused(runs, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("Anna found the letter.\n")
    line = mistake(capsys, "--ckpt", runs / "topk", "--data", short, "--out", tmp_path / "out")
    assert "has 0 rows of 96 tokens: neurons need at least 8" in line
    short.write_text("")
    line = mistake(capsys, "--ckpt", runs / "topk", "--data", short, "--out", tmp_path / "out")
    assert "holds no document" in line


def test_a_tokenizer_that_does_not_fit_is_refused(runs, tmp_path, capsys):
    path = runs / "tokenizer.model"
    before = path.read_bytes()
    path.write_bytes(train_tokenizer(["the cat sat on the mat " * 40], 280))
    try:
        line = mistake(capsys, "--ckpt", runs / "topk", "--out", tmp_path / "out", *FEW)
    finally:
        path.write_bytes(before)
    assert "is another one than the model was trained with" in line


def test_a_twin_of_another_kind_is_refused(runs, tmp_path, capsys):
    line = mistake(capsys, "--ckpt", runs / "topk", "--twin", runs / "topk", *FEW,
                   "--out", tmp_path / "out")  # fmt: skip
    assert "has TopK itself" in line
    early = runs / "twin" / "checkpoints" / f"{20:010d}"
    line = mistake(
        capsys, "--ckpt", runs / "topk", "--twin", early, *FEW, "--out", tmp_path / "out"
    )
    assert "has step=20, the model 30: give the run that was trained alike" in line


def test_other_settings_need_another_folder(runs, analysed, capsys):
    line = mistake(capsys, "--ckpt", runs / "topk", "--out", analysed, *FEW)
    assert "holds an analysis with another twin" in line


def test_words_that_are_gone_are_measured_again(runs, analysed, tmp_path):
    copied = shutil.copytree(analysed, tmp_path / "copied")
    (copied / "model" / "words" / "01.jsonl").unlink()
    analyze.main(["--ckpt", str(runs / "topk"), "--twin", str(runs / "twin"), *FEW,
                  "--out", str(copied)])  # fmt: skip
    assert (
        folder.read_layers(copied / "model")[1].words
        == folder.read_layers(analysed / "model")[1].words
    )


def test_another_file_of_vectors_is_noticed(runs, tmp_path, capsys):
    vectors = tmp_path / "vectors.txt"
    argv = ["--ckpt", runs / "topk", *FEW, "--out", tmp_path / "out", "--vectors", vectors]
    vectors.write_text("the 1 0\nletter 0 1\nriver 1 1\n")
    analyze.main([str(one) for one in argv])
    vectors.write_text("the 1 0\nletter 0 1\nriver 1 2\n")
    assert "holds an analysis with another vectors" in mistake(capsys, *argv)


def test_neurons_of_a_feed_forward(runs, tmp_path):
    """As many as it is wide, the twin's too; what they promote is not defined."""
    for name, more in {"mlp": ["model.topk.site=mlp"], "mlp_twin": ["model.topk=null"]}.items():
        train_on(runs, tmp_path / name, "steps=4", "model.weight_tying=true", *more)
    analyze.main(["--ckpt", str(tmp_path / "mlp"), "--twin", str(tmp_path / "mlp_twin"), *FEW,
                  "--out", str(tmp_path / "out"), "--dtype", "bf16"])  # fmt: skip
    model = open_checkpoint(checkpoint_folder(str(tmp_path / "mlp"))).model("cpu", torch.float32)
    width = model.layers[0].feed_forward.w1.weight.shape[0]
    for part in ("model", "twin", "random"):
        for one in folder.read_layers(tmp_path / "out" / part):
            assert all(len(array) == width for array in one.arrays.values())
            assert "promoted" not in one.arrays


def test_a_folder_of_something_else_is_left_alone(runs, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    line = mistake(capsys, "--ckpt", runs / "topk", "--out", tmp_path, *FEW)
    assert "is there and is no analysis" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_recording_is_named(runs, analysed, tmp_path, capsys):
    copied = shutil.copytree(analysed, tmp_path / "copied")
    split = next((copied / "model" / "recording" / "layers.1").glob("*.safetensors"))
    split.write_bytes(split.read_bytes()[:-100])
    line = mistake(capsys, "--ckpt", runs / "topk", "--twin", runs / "twin", "--out", copied, *FEW)
    assert "damaged" in line or "cut short" in line, line
