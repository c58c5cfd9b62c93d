"""apps.topk.trace on a small run: what it writes, that it goes on where it stopped, mistakes."""

import json
import logging
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from apps.topk import trace
from apps.topk.checkpoint import open_checkpoint
from apps.topk.neurons.corpus import rows_of_corpus, text_of
from apps.topk.neurons.reading import reader_of
from apps.topk.tracing import work
from apps.topk.tracing.recorder import Recorder
from apps.topk.tracing.summary import Trace, neuron_summary, quartiles, summary
from apps.topk.train import train
from lingua_topk.analysis.neurons import entropy
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from tests.apps.tiny import K, train_args, write_corpus

STEPS = [10, 20, 30]
ANNEALED_AT = 15  # half of the run: the first checkpoint lies before it
TOKENS, ROW_LENGTH = 1024, 32
LAYERS, WIDTH = 3, 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The dump_dir of a run with three checkpoints; not to be changed."""
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("runs") / "topk"
    train(train_args(root, folder))
    logging.getLogger().handlers[:] = []
    return folder


@pytest.fixture(scope="module")
def traced(run, tmp_path_factory):
    """The folder of a whole trace; not to be changed."""
    out = tmp_path_factory.mktemp("traced") / "out"
    follow(run, out, "--neuron", "0:5", "--neuron", "2:31,0:5")
    return out


def follow(run, out, *arguments):
    given = ["--ckpts", run, "--out", out, "--tokens", TOKENS, *arguments]
    trace.main([str(argument) for argument in given])


def read(out):
    return json.loads((out / "trace.json").read_text(encoding="utf-8"))


def dense_values(run, step):
    """What each layer gives at each place, [L, places, D], the K largest by magnitude alone."""
    checkpoint = open_checkpoint(run / "checkpoints" / f"{step:010d}")
    model = checkpoint.model("cpu", torch.float32, as_trained=True)
    tokens = rows_of_corpus(checkpoint, [], TOKENS).tokens
    outputs = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, y: outputs.append(y.flatten(0, 1)))
        for block in model.layers
    ]
    reader_of(model)(torch.from_numpy(tokens).long())
    for hook in hooks:
        hook.remove()
    values = torch.stack(outputs)  # [L, places, D]
    least = values.abs().topk(K, dim=-1).values[..., -1:]
    return torch.where(values.abs() >= least, values, 0).numpy(), tokens.reshape(-1)


def test_all_neurons_are_measured_as_in_the_plain_dense_computation(run, traced):
    arrays = load_file(traced / "trace.safetensors")
    assert arrays["steps"].tolist() == STEPS
    dense = [dense_values(run, step) for step in STEPS]
    tokens = dense[-1][1]
    one_hot = np.eye(258)[tokens]  # [places, V]
    mass = np.stack([np.abs(values).transpose(0, 2, 1) @ one_hot for values, _ in dense])
    totals = mass.sum(axis=-1, keepdims=True)  # [C, L, D, 1]
    share = np.divide(mass, totals, out=np.zeros_like(mass), where=totals > 0)
    overlap = np.minimum(share, share[-1]).sum(axis=-1)  # [C, L, D]
    for layer in range(LAYERS):
        found = {
            name: arrays[f"layers.{layer}.{name}"]
            for name in ("counts", "token_entropy", "overlap", "settle_step")
        }
        counts = np.stack([(values[layer] != 0).sum(axis=0) for values, _ in dense])
        # Equal values at the limit may be kept or not; there are next to none.
        np.testing.assert_allclose(found["counts"], counts, atol=2)
        np.testing.assert_allclose(found["overlap"], overlap[:, layer], atol=0.02)
        expected = np.array([[entropy(one) for one in step[layer]] for step in mass])
        np.testing.assert_allclose(found["token_entropy"], expected, atol=0.05)
        for neuron, step in enumerate(found["settle_step"]):
            same = found["overlap"][:, neuron] >= 0.5
            first = next((s for i, s in enumerate(STEPS) if same[i:].all()), -1)
            assert step == first
        moved = np.minimum(share, np.roll(share[-1], -(WIDTH // 2), axis=1)).sum(axis=-1)
        baseline = arrays[f"layers.{layer}.shifted_overlap"]
        np.testing.assert_allclose(baseline, moved[:, layer], atol=0.02)
        largest = share[-1, layer].argmax(axis=-1)
        alive = counts[-1] > 0
        shares = arrays[f"layers.{layer}.top_token_share"][-1, :, 0]
        np.testing.assert_allclose(shares[alive], share[-1, layer].max(axis=-1)[alive], atol=0.02)
        same = arrays[f"layers.{layer}.top_tokens"][-1, :, 0] == largest
        assert same[alive].mean() > 0.9
    assert arrays["over_layers.pairs"].tolist() == [[0, 1], [0, 2], [1, 2]]
    last = dense[-1][0].astype(np.float64)
    for row, (a, b) in enumerate(arrays["over_layers.pairs"]):
        for i in range(WIDTH):
            with np.errstate(invalid="ignore", divide="ignore"):
                expected = np.corrcoef(last[a][:, i], last[b][:, i])[0, 1]
            found = arrays["over_layers.correlation"][row, i]
            assert found == pytest.approx(expected, abs=0.02, nan_ok=True)


def test_the_first_checkpoint_is_measured_as_it_was_trained_and_with_as_many_values(run, traced):
    content = read(traced)
    assert content["alphas"] == pytest.approx([1 - 10 / ANNEALED_AT, 0, 0])
    assert content["annealed_at"] == ANNEALED_AT
    arrays = load_file(traced / "trace.safetensors")
    n_tokens = content["corpus"]["tokens"]
    for layer in range(LAYERS):
        survivors = arrays[f"layers.{layer}.counts"].sum(axis=1)  # [C]
        assert (survivors <= K * n_tokens).all()
        assert (survivors > 0.4 * K * n_tokens).all()


def test_hard_selection_on_request(run, tmp_path, traced):
    follow(run, tmp_path / "hard", "--as_trained", "false")
    content = read(tmp_path / "hard")
    assert content["alphas"] == [0, 0, 0]
    assert content["settings"]["as_trained"] is False
    ours, theirs = (load_file(out / "trace.safetensors") for out in (tmp_path / "hard", traced))
    assert not np.array_equal(ours["layers.1.overlap"][0], theirs["layers.1.overlap"][0])
    np.testing.assert_array_equal(ours["layers.1.overlap"][1:], theirs["layers.1.overlap"][1:])


def test_what_is_written(traced, capsys):
    content = read(traced)
    assert content["version"] == 1 and content["steps"] == STEPS
    assert content["settings"]["kept"] == f"the {K} largest by magnitude"
    assert "circular" in content["settings"]["vectors"]
    assert content["topk_layers"] == [0, 1]
    assert [one["layer"] for one in content["layers"]] == [0, 1, 2]
    assert [one["is_topk"] for one in content["layers"]] == [True, True, False]
    for one in content["layers"]:
        assert one["overlap"]["median"][-1] == pytest.approx(1)
        assert one["settled"]["share"][-1] == 1
        assert all(a <= b for a, b in pairwise(one["settled"]["share"]))
        assert sum(one["settled"]["neurons"]) + one["settled"]["never"] == WIDTH
    assert [one["layers"] for one in content["over_layers"]["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    assert content["over_layers"]["shift"] == WIDTH // 2
    assert content["provenance"]["lingua_topk"]
    names = {path.name for path in traced.iterdir()}
    figures = {"settling", "overlap", "token_entropy", "semantic_entropy", "layers"}
    assert names == {"trace.json", "trace.safetensors", "checkpoints"} | {
        f"{name}.svg" for name in figures
    }
    for name in figures:
        assert (traced / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")


def test_the_neurons_asked_for_are_written_out(run, traced, tmp_path, capsys):
    content = read(traced)
    assert [one["neuron"] for one in content["neurons"]] == ["0:5", "2:31"]
    arrays = load_file(traced / "trace.safetensors")
    for one in content["neurons"]:
        layer, index = one["layer"], one["index"]
        assert [entry["step"] for entry in one["checkpoints"]] == STEPS
        for i, entry in enumerate(one["checkpoints"]):
            overlap = arrays[f"layers.{layer}.overlap"][i, index]
            assert entry["overlap"] == pytest.approx(overlap)
            assert entry["firings"] == arrays[f"layers.{layer}.counts"][i, index]
            ids = arrays[f"layers.{layer}.top_tokens"][i, index]
            assert [token["token"] for token in entry["top_tokens"]] == ids[ids >= 0].tolist()
            for token in entry["top_tokens"]:
                assert token["text"] == (chr(token["token"]) if token["token"] < 128 else "")
        others = [other for other in range(LAYERS) if other != layer]
        assert [entry["layer"] for entry in one["over_layers"]] == others
    follow(run, traced, "--neuron", "0:5")
    out = capsys.readouterr().out
    assert out.startswith("0:5 ") and f"written: {traced} (3 checkpoints, 3 layers)" in out
    assert len([line for line in out.splitlines() if line.split()[0] in map(str, STEPS)]) == 3


class Stopped(Exception):
    pass


@pytest.fixture
def measured(monkeypatch):
    """The steps of the checkpoints that are recorded, in their order."""
    steps = []
    record = Recorder.record

    def listening(self, checkpoint, *arguments):
        steps.append(checkpoint.step)
        return record(self, checkpoint, *arguments)

    monkeypatch.setattr(Recorder, "record", listening)
    return steps


def test_a_trace_that_was_stopped_goes_on(run, traced, tmp_path, monkeypatch, measured):
    """Stopped after the second of three checkpoints, and once within the third."""
    whole, out = measured, tmp_path / "out"
    measure, calls = work.measure, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Stopped
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(work, "measure", stopping)
        with pytest.raises(Stopped):
            follow(run, out)
    assert whole == [30, 10, 20]
    assert not (out / "trace.json").exists()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "0000000010.safetensors", "0000000030.safetensors", "over_layers.safetensors",
    ]  # fmt: skip
    del whole[:]
    follow(run, out)
    assert whole == [30, 20]  # their recordings are there and are taken as they are
    ours, theirs = (load_file(one / "trace.safetensors") for one in (out, traced))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
    assert not (out / "recordings").exists()
    del whole[:]
    follow(run, out, "--neuron", "1:0", "--settled", "0.9")
    assert whole == []
    assert read(out)["settings"]["settled"] == 0.9


def test_what_changes_is_measured_again(run, traced, tmp_path, measured):
    out = shutil.copytree(traced, tmp_path / "out")
    (out / "checkpoints" / f"{10:010d}.safetensors").write_bytes(b"cut short")
    follow(run, out)
    assert measured == [30, 10]  # the last one is what it is compared with
    del measured[:]
    written = run / "checkpoints" / f"{20:010d}" / ".metadata"
    times = written.stat()
    try:
        written.touch()  # as when other weights are written there
        follow(run, out)
    finally:
        os.utime(written, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert measured == [30, 20]
    del measured[:]
    follow(run, out, "--k", 3)
    assert sorted(measured) == STEPS


def test_another_semantic_entropy_is_measured_again(run, traced, tmp_path, measured):
    out = shutil.copytree(traced, tmp_path / "out")
    given = {"threshold": 0.25, "min_words": 2, "max_words": 20}
    used = {name: read(traced)["settings"][name] for name in given}
    for name, value in given.items():
        follow(run, out, f"--{name}", value)
        assert sorted(measured) == STEPS
        assert {one: read(out)["settings"][one] for one in given} == used | {name: value}
        del measured[:]


def test_vectors_of_a_file_do_not_need_the_model(run, tmp_path, monkeypatch):
    last = open_checkpoint(run / "checkpoints" / f"{STEPS[-1]:010d}")
    rows = rows_of_corpus(last, [], TOKENS)
    word = text_of(rows, last, "").words.words[0]
    path = tmp_path / "vectors.txt"
    path.write_text(f"{word} 3 4\n", encoding="utf-8")
    monkeypatch.setattr(type(last), "model", None)
    text = text_of(rows, last, str(path))
    assert text.vectors.vectors[0] == pytest.approx([0.6, 0.8])


def test_some_layers_and_a_default_folder(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / f"{20:010d}")
    trace.main(["--ckpts", str(run), "--tokens", "1024", "--layers", "1"])
    out = run / "neurons" / "trace"
    content = read(out)
    assert content["steps"] == [10, 30]
    assert [one["layer"] for one in content["layers"]] == [1]
    assert content["over_layers"]["pairs"] == []
    assert not (out / "layers.svg").exists()


MISTAKES = [
    (["--neuron", "5"], "neuron='5' is not allowed: give LAYER:INDEX"),
    (["--neuron", "0:-1"], "neuron='0:-1' is not allowed"),
    (["--neuron", "0:32"], "neuron=0:32 is not in the model: give an index from 0 to 31"),
    (["--neuron", "3:0"], "neuron=3:0 is of a layer that is not recorded"),
    (["--neuron", "0:1", "--layers", "1,2"], "neuron=0:1 is of a layer that is not recorded"),
    (["--layers", "3"], "layers='3' is not allowed: give numbers from 0 to 2"),
    (["--layers", "first"], "layers='first' is not allowed"),
    (["--threshold", "1"], "threshold=1.0 is not allowed: give at least 0 and less than 1"),
    (["--threshold", "nan"], "threshold=nan is not allowed"),
    (["--min_words", "1"], "min_words=1 is too small: give at least 2"),
    (["--max_words", "9"], "max_words=9 is less than min_words=10"),
    (["--settled", "0"], "settled=0.0 is not allowed"),
    (["--settled", "nan"], "settled=nan is not allowed"),
    (["--dtype", "int8"], "dtype='int8' is not known"),
    (["--device", "gpu"], "device='gpu' is not known"),
    (["--k", "-1"], "k=-1 is not allowed"),
    (["--row_length", "-1"], "row_length=-1 is not allowed"),
    (["--batch_tokens", "0"], "batch_tokens=0 is too small"),
    (["--vectors", "nowhere.txt"], "vectors='nowhere.txt' is not there"),
    (["--row_length", "33"], "row_length=33 is not allowed"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(run, arguments, message, tmp_path, measured):
    with pytest.raises(ConfigError, match=message) as error:
        follow(run, tmp_path / "out", *arguments)
    assert "\n" not in str(error.value) and measured == []


def test_too_little_text(run, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Hardly anything.", encoding="utf-8")
    with pytest.raises(DataError, match="has 0 rows of 32 tokens"):
        follow(run, tmp_path / "out", "--data", text)
    with pytest.raises(ConfigError, match="tokens=10 is too few"):
        trace.main(["--ckpts", str(run), "--out", str(tmp_path / "out"), "--tokens", "10"])


def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds mine\.txt, which is no part of a trace"):
        follow(run, tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        follow(run, tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_folders_without_enough_checkpoints(run, tmp_path):
    for folder in ("", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            follow(folder, tmp_path / "out")
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint: tracing needs at least two"):
        follow(copy, tmp_path / "out")
    name = f"{30:010d}"
    shutil.copytree(run / "checkpoints" / name, copy / "checkpoints" / name)
    (copy / "checkpoints" / f"{40:010d}").mkdir()  # one that is just being written
    with pytest.raises(CheckpointError, match="has one checkpoint only"):
        follow(copy, tmp_path / "out")


@pytest.fixture
def unchecked(monkeypatch):
    """Files may be changed without notice."""
    monkeypatch.setattr("apps.topk.checkpoint.find_damage", lambda folder: None)


def test_checkpoints_of_another_model(run, tmp_path, unchecked):
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "checkpoints" / f"{20:010d}" / "params.json"
    params = json.loads(path.read_text(encoding="utf-8"))
    params["model"]["dim"] = 64
    path.write_text(json.dumps(params), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"another model.*model\.dim is 64 in the one and 32"):
        follow(copy, tmp_path / "out")


def test_a_tokenizer_that_does_not_fit(run, tmp_path, unchecked):
    copy = shutil.copytree(run, tmp_path / "run")
    for path in copy.glob("checkpoints/*/params.json"):
        params = json.loads(path.read_text(encoding="utf-8"))
        params["tokenizer_sha256"] = "0" * 64
        path.write_text(json.dumps(params), encoding="utf-8")
    with pytest.raises(CheckpointError, match="its tokenizer's file None is another one"):
        follow(copy, tmp_path / "out")


def made_up_trace():
    """Two layers of two neurons at two checkpoints; neuron 0 of layer 0 is dead in the end."""
    counts = np.array([[4, 4], [0, 4]])
    alive = np.array([[4, 4], [4, 4]])
    nan = float("nan")
    arrays = {}
    for layer, fired in enumerate((counts, alive)):
        ids = np.full((2, 2, 10), -1, np.int32)
        ids[:, :, 0] = 1
        of_layer = {
            "counts": fired,
            "token_entropy": np.where(fired > 0, [[1.0, 2.0], [3.0, 4.0]], nan),
            "semantic_entropy": np.full((2, 2), nan),
            "overlap": np.where(fired[-1] > 0, [[0.25, 0.75], [1, 1]], 0),
            "shifted_overlap": np.where(fired[-1][::-1] > 0, [[0.5, 0.125], [0.5, 0.125]], 0),
            "top_tokens": ids,
            "top_token_share": (ids >= 0).astype(np.float32),
            "settle_step": np.where(fired[-1] > 0, [2, 1], -1),
        }
        arrays |= {f"layers.{layer}.{name}": array for name, array in of_layer.items()}
    of_pairs = {
        "pairs": np.array([[0, 1]]),
        "shift": np.array([1]),
        "overlap": np.array([[0, 0.5]]),
        "correlation": np.array([[nan, 0.4]]),
        "shifted_overlap": np.array([[0, 0.1]]),
        "shifted_correlation": np.array([[nan, -0.2]]),
    }
    arrays |= {f"over_layers.{name}": array for name, array in of_pairs.items()}
    return Trace([1, 2], [0, 1], [0, 1], arrays, [b"", b"\xe6"])


def test_summaries_leave_dead_neurons_out():
    found = summary(made_up_trace())
    first, second = found["layers"]
    assert first["dead"] == [0, 1]
    assert first["token_entropy"]["median"] == [1.5, 4]
    assert first["overlap"]["median"] == [0.75, 1]
    assert first["shifted_overlap"]["median"] == [0.5, 0.5]  # against neuron 1, which is alive
    assert first["settled"] == {"neurons": [1, 0], "share": [1, 1], "never": 1}
    assert second["settled"] == {"neurons": [1, 1], "share": [0.5, 1], "never": 0}
    assert first["semantic_entropy"]["median"] == [None, None] and first["scored"] == [0, 0]
    (pair,) = found["over_layers"]["pairs"]
    assert pair["neurons"] == 1
    medians = {name: pair[name]["median"] for name in pair if name not in ("layers", "neurons")}
    assert medians == {
        "overlap": 0.5, "correlation": 0.4, "shifted_overlap": 0.1, "shifted_correlation": -0.2,
    }  # fmt: skip


def test_a_neuron_of_the_higher_layer_has_its_own_baseline():
    """Its partner at the distance is the lower layer's neuron with an index smaller by it."""
    found = made_up_trace()
    (entry,) = neuron_summary(found, 1, 0)["over_layers"]
    assert entry == {
        "layer": 0, "overlap": 0, "correlation": None, "shifted_overlap": 0.1,
        "shifted_correlation": -0.2,
    }  # fmt: skip
    (entry,) = neuron_summary(found, 0, 1)["over_layers"]
    assert entry["layer"] == 1 and entry["shifted_overlap"] == 0.1
    dead = neuron_summary(found, 0, 0)
    assert dead["settle_step"] is None
    assert dead["checkpoints"][1]["token_entropy"] is None
    assert dead["checkpoints"][0]["top_tokens"] == [{"token": 1, "text": "\\xe6", "share": 1.0}]


def test_quartiles_of_nothing_are_none():
    found = quartiles(np.array([[1.0, 2, 9], [1, 2, 3]]), np.array([[1, 1, 0], [0, 0, 0]], bool))
    assert found == {"q1": [1.25, None], "median": [1.5, None], "q3": [1.75, None]}
