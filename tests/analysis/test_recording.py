"""Reading a recording back: its layout, blocks, widths of its numbers, and damage."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import lingua_topk.analysis._sorting as sorting
import lingua_topk.analysis._unfinished as unfinished
from lingua_topk.analysis.recording import groups, open_recording
from lingua_topk.errors import DataError
from tests.analysis.recorded import (
    N_ROWS,
    ROW_LENGTH,
    TOKENS,
    WIDTH,
    Fake,
    by_definition,
    recorded,
    sparse,
    survivors,
)

OUTPUTS = {0: sparse(seed=0), 4: sparse(seed=4)}


@pytest.fixture
def small_pieces(monkeypatch):
    """Files, and pieces of work, of so few survivors that there are several."""
    monkeypatch.setattr(sorting, "SURVIVORS_A_FILE", 30)
    monkeypatch.setattr(sorting, "SURVIVORS_AT_ONCE", 7)
    monkeypatch.setattr(sorting, "TOKENS_AT_ONCE", 10)
    monkeypatch.setattr(unfinished, "PLACES_AT_ONCE", 5)


def delphi_read(folder):
    """What delphi's loader makes of a module's folder: (row, position, latent, value) of all.

    The files are START_END.safetensors; latents are counted from START; the tokens are those of
    the first file. Files are read whole, by the library.
    """
    found, tokens = [], []
    files = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0]))
    for path in files:
        start = int(path.stem.split("_")[0])
        held = load_file(path)
        for (row, position, latent), value in zip(
            held["locations"].tolist(), held["activations"].tolist(), strict=True
        ):
            found.append((row, position, latent + start, value))
        tokens.append(held["tokens"])
    return found, tokens, files


def test_the_files_are_as_delphi_reads_them(tmp_path, small_pieces):
    recorded(Fake(OUTPUTS), tmp_path)
    for i, y in OUTPUTS.items():
        found, tokens, files = delphi_read(tmp_path / f"layers.{i}")
        assert len(files) > 2
        places = [(row * ROW_LENGTH + position, n, value) for row, position, n, value in found]
        assert places == by_definition(y)
        for one in tokens:
            assert one.dtype == np.int32 and np.array_equal(one, TOKENS)
        config = json.loads((tmp_path / f"layers.{i}" / "config.json").read_text())
        assert config["model_name"] == "fake"
        assert config["ctx_len"] == config["cache_ctx_len"] == ROW_LENGTH
        assert config["n_tokens"] == TOKENS.numel()
        assert config["n_splits"] == len(files)


def test_files_are_cut_between_neurons_where_they_would_be_too_large(tmp_path, small_pieces):
    recorded(Fake({0: OUTPUTS[0]}), tmp_path)
    counts = np.bincount([neuron for _, neuron, _ in by_definition(OUTPUTS[0])], minlength=WIDTH)
    edges = [(start, stop - 1) for start, stop in groups(counts, 30)]
    paths = {f"{start}_{end}.safetensors" for start, end in edges}
    assert {path.name for path in (tmp_path / "layers.0").glob("*.safetensors")} == paths
    for start, end in edges:
        with safe_open(tmp_path / "layers.0" / f"{start}_{end}.safetensors", "np") as file:
            assert file.get_tensor("counts").tolist() == counts[start : end + 1].tolist()
            assert file.get_slice("locations").get_dtype() == "U16"


def test_groups_are_as_long_as_the_limit_allows():
    assert list(groups(np.array([3, 0, 2, 9, 1, 1, 0, 5]), 5)) == [(0, 3), (3, 4), (4, 7), (7, 8)]
    assert list(groups(np.array([0, 0]), 5)) == [(0, 2)]
    assert list(groups(np.array([], int), 5)) == []


@pytest.mark.parametrize("max_survivors", [1, 10, 35, 10**6])
def test_blocks_hold_every_neuron_once_and_no_more_than_was_asked_for(
    tmp_path, small_pieces, max_survivors
):
    layer = recorded(Fake({0: OUTPUTS[0]}), tmp_path).layer(0)
    expected = by_definition(OUTPUTS[0])
    blocks = list(layer.blocks(max_survivors))
    assert [block.first for block in blocks] == [
        sum(len(one.counts) for one in blocks[:i]) for i in range(len(blocks))
    ]
    assert np.array_equal(np.concatenate([block.counts for block in blocks]), layer.counts)
    assert survivors(layer, max_survivors=max_survivors) == expected
    for block in blocks:
        assert len(block.places) <= max_survivors or len(block.counts) == 1
        assert (block.counts.dtype, block.places.dtype) == (np.int64, np.int64)
        assert block.values.dtype == np.float32
        for i in range(len(block.counts)):
            own = slice(block.offsets[i], block.offsets[i + 1])
            assert (block.neurons[own] == i).all()
            assert len(block.places[own]) == block.counts[i]


def test_one_neuron_is_read_by_itself(tmp_path, small_pieces):
    layer = recorded(Fake(OUTPUTS), tmp_path).layer(4)
    for i in range(WIDTH):
        places, values = layer.neuron(i)
        expected = [(p, v) for p, neuron, v in by_definition(OUTPUTS[4]) if neuron == i]
        assert list(zip(places.tolist(), values.tolist(), strict=True)) == expected
    with pytest.raises(DataError, match="neuron 4:10 is not in the recording: it has 0 to 9"):
        layer.neuron(WIDTH)


def test_what_a_recording_says_about_itself(tmp_path):
    recorded(Fake(OUTPUTS), tmp_path)
    recording = open_recording(str(tmp_path))
    assert recording.folder == tmp_path
    assert (recording.n_tokens, recording.width, recording.layers) == (42, WIDTH, [0, 4])
    assert recording.tokens.dtype == np.int32
    assert np.array_equal(recording.tokens, TOKENS)
    assert np.array_equal(load_file(tmp_path / "tokens.safetensors")["tokens"], TOKENS)
    assert recording.info["inputs"] == {"seed": 0}
    layer = recording.layer(4)
    assert (layer.index, layer.is_topk, layer.kept) == (4, True, "survivors")
    assert (layer.n_tokens, layer.width) == (42, WIDTH)
    assert layer.counts.dtype == np.int64
    assert layer.counts[2] == 0
    with pytest.raises(DataError, match="has no layer 1: it has 0, 4"):
        recording.layer(1)


def test_a_layer_without_any_survivor(tmp_path):
    layer = recorded(Fake({0: torch.zeros(N_ROWS, ROW_LENGTH, WIDTH)}), tmp_path).layer(0)
    (block,) = layer.blocks()
    assert block.counts.tolist() == [0] * WIDTH
    assert len(block.places) == len(block.values) == len(block.neurons) == 0
    assert load_file(tmp_path / "layers.0" / "0_9.safetensors")["locations"].shape == (0, 3)


# ---- Numbers too large for 16 bits


@pytest.mark.parametrize("rows, dtype", [(2**16, "U16"), (2**16 + 1, "U32")])
def test_many_rows(tmp_path, rows, dtype):
    tokens = torch.arange(rows)[:, None]  # rows of one token
    y = torch.zeros(rows, 1, 2)
    y[[0, 9, rows - 1], 0, 1] = torch.tensor([1.0, 2.0, 3.0])
    recording = recorded(
        Fake({0: y}, tokens[:, [0]]), tmp_path, rows=tokens, row_length=1, n_rows=rows,
        batch_rows=2**13, vocab_size=rows,
    )  # fmt: skip
    assert survivors(recording.layer(0)) == [(0, 1, 1.0), (9, 1, 2.0), (rows - 1, 1, 3.0)]
    assert dtype_of_locations(tmp_path / "layers.0" / "0_1.safetensors") == dtype
    assert recording.tokens.max() == rows - 1  # more than 16 bits hold


@pytest.mark.parametrize("width, dtype", [(2**16, "U16"), (2**16 + 1, "U32")])
def test_many_neurons(tmp_path, width, dtype):
    y = torch.zeros(N_ROWS, ROW_LENGTH, width)
    y[2, 3, [0, width - 1]] = torch.tensor([5.0, -1.0])
    recording = recorded(Fake({0: y}), tmp_path)
    place = 2 * ROW_LENGTH + 3
    assert survivors(recording.layer(0)) == [(place, 0, 5.0), (place, width - 1, -1.0)]
    path = tmp_path / "layers.0" / f"0_{width - 1}.safetensors"
    assert dtype_of_locations(path) == dtype


def test_long_rows(tmp_path):
    length = 2**16 + 1
    tokens = torch.zeros(1, length, dtype=torch.int64)
    y = torch.zeros(1, length, 2)
    y[0, -1, 1] = 4.0
    recording = recorded(Fake({0: y}, tokens), tmp_path, rows=tokens, row_length=length, n_rows=1)
    assert survivors(recording.layer(0)) == [(length - 1, 1, 4.0)]
    assert dtype_of_locations(tmp_path / "layers.0" / "0_1.safetensors") == "U32"


def dtype_of_locations(path):
    with safe_open(path, "np") as file:
        return file.get_slice("locations").get_dtype()


# ---- Damage


def shorten(path):
    path.write_bytes(path.read_bytes()[:-3])


def garble(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def change_header(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"I32"'))


def change_locations(path):
    path.write_bytes(path.read_bytes()[:-2] + b"\x07\x00")


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


DAMAGE = [shorten, garble, change_header, huge_header, lambda path: path.unlink()]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line(tmp_path, small_pieces, damage):
    recorded(Fake(OUTPUTS), tmp_path)
    damage(max((tmp_path / "layers.4").glob("*.safetensors")))
    check_refused(tmp_path)


@pytest.mark.parametrize("damage", [shorten, garble, huge_header, lambda path: path.unlink()])
def test_damaged_tokens_are_one_line(tmp_path, damage):
    recorded(Fake(OUTPUTS), tmp_path)
    damage(tmp_path / "tokens.safetensors")
    check_refused(tmp_path)


def test_wrong_locations_are_noticed_when_they_are_read(tmp_path):
    recorded(Fake(OUTPUTS), tmp_path)
    change_locations(tmp_path / "layers.0" / "0_9.safetensors")
    with pytest.raises(DataError, match="its locations are wrong"):
        list(open_recording(tmp_path).layer(0).blocks())


@pytest.mark.parametrize(
    "text",
    ["", "\xff", "[1]", "{}", '{"version": 2}', '{"version": 1}', '{"version": 1, "n_'],
)
def test_a_damaged_description_is_one_line(tmp_path, text):
    recorded(Fake(OUTPUTS), tmp_path)
    (tmp_path / "recording.json").write_text(text, encoding="latin-1")
    check_refused(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"width": -1}, {"width": 9}, {"n_rows": "7"}, {"n_rows": 8}, {"layers": []},
        {"vocab_size": 3}, {"layers": {"../x": {"layer": 0, "survivors": 1}}},
        {"layers": {"layers.0": {"layer": 0, "survivors": 5, "is_topk": True, "kept": "all"}}},
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_the_files_is_one_line(tmp_path, change):
    recorded(Fake(OUTPUTS), tmp_path)
    path = tmp_path / "recording.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    check_refused(tmp_path)


def check_refused(folder):
    with pytest.raises(DataError) as caught:
        open_recording(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "record again" in str(caught.value)


def test_a_folder_that_is_no_recording(tmp_path):
    with pytest.raises(DataError, match="is no recording"):
        open_recording(tmp_path)
    with pytest.raises(DataError, match="is no recording"):
        open_recording(tmp_path / "nowhere")
