"""Recordings that are cut short and gone on with, made again, or refused."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lingua_topk.analysis._sorting as sorting
import lingua_topk.analysis.record as recorder
from lingua_topk.analysis.recording import UNFINISHED_NAME, open_recording
from lingua_topk.errors import ConfigError, DataError
from tests.analysis.recorded import N_ROWS, TOKENS, Fake, contents, recorded, sparse

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = {0: sparse(seed=0), 4: sparse(seed=4)}
KILLED = """
import os, signal, sys
import lingua_topk.analysis.record as recorder
from tests.analysis.recorded import Fake, TOKENS, recorded, sparse

class Killed(Fake):
    def forward(self, tokens):
        super().forward(tokens)
        if self.passes == 4:
            os.kill(os.getpid(), signal.SIGKILL)

recorder.SAVE_SECONDS = float(sys.argv[2])
recorded(Killed({0: sparse(seed=0), 4: sparse(seed=4)}), sys.argv[1], batch_rows=1)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a recording that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    recorded(Fake(OUTPUTS), out)
    return contents(out)


def no_rows():
    raise AssertionError("the corpus is not to be read")
    yield


@pytest.mark.parametrize("stop_at", range(N_ROWS))
def test_what_was_stopped_goes_on_where_it_was(tmp_path, whole, stop_at):
    with pytest.raises(InterruptedError):
        recorded(Fake(OUTPUTS, stop_at=stop_at), tmp_path, batch_rows=1)
    with pytest.raises(DataError, match="unfinished recording: run what made it again"):
        open_recording(tmp_path)
    again, told = Fake(OUTPUTS), []
    recorded(again, tmp_path, batch_rows=1, on_progress=told.append)
    assert told[0] == stop_at
    assert again.passes == N_ROWS - stop_at
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("save_seconds, rows_kept", [(0, 3), (1000, 0)])
def test_what_was_killed_goes_on_from_where_it_was_saved(tmp_path, whole, save_seconds, rows_kept):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, str(save_seconds)], cwd=ROOT, check=False
    )
    assert process.returncode == -signal.SIGKILL
    again = Fake(OUTPUTS)
    recorded(again, tmp_path, batch_rows=1)
    assert again.passes == N_ROWS - rows_kept
    assert contents(tmp_path) == whole


def test_what_came_after_the_last_save_is_cut_off(tmp_path, whole):
    with pytest.raises(InterruptedError):
        recorded(Fake(OUTPUTS, stop_at=2), tmp_path)
    for path in (tmp_path / UNFINISHED_NAME).iterdir():
        if path.suffix != ".json":
            with open(path, "ab") as file:
                file.write(b"half a batch")
    recorded(Fake(OUTPUTS), tmp_path)
    assert contents(tmp_path) == whole


def test_finishing_is_begun_again_wherever_it_was_cut_short(tmp_path, whole, monkeypatch):
    """Every file gets its name by os.replace: each of these calls fails once."""
    replace, calls = sorting.os.replace, 0

    def failing(source, target):
        nonlocal calls
        if Path(source).parent.name == UNFINISHED_NAME:
            return replace(source, target)
        calls += 1
        if calls == fail_at:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(sorting.os, "replace", failing)
    for fail_at in range(1, 100):
        out, calls = tmp_path / str(fail_at), 0
        try:
            recorded(Fake(OUTPUTS), out)
        except KeyboardInterrupt:
            with pytest.raises(DataError, match="unfinished"):
                open_recording(out)
            recorded(Fake(OUTPUTS), out, rows=no_rows())
            assert contents(out) == whole
        else:
            break
    assert calls == 2 * 2 + 2  # a file and its config a layer, the tokens, recording.json


def test_a_finished_recording_is_returned_without_reading_the_corpus(tmp_path, whole):
    recorded(Fake(OUTPUTS), tmp_path)
    fake = Fake(OUTPUTS, stop_at=0)
    recording = recorded(fake, tmp_path, rows=no_rows(), batch_rows=1)
    assert recording.layers == [0, 4]
    assert contents(tmp_path) == whole


def test_leftovers_of_a_call_that_ended_at_its_last_step_are_removed(tmp_path, whole):
    recorded(Fake(OUTPUTS), tmp_path)
    (tmp_path / UNFINISHED_NAME).mkdir()
    (tmp_path / UNFINISHED_NAME / "tokens").write_bytes(b"1234")
    recorded(Fake(OUTPUTS), tmp_path, rows=no_rows())
    assert contents(tmp_path) == whole


OTHERS = [
    ({"inputs": {"seed": 1}}, r"another inputs\.seed: choose a new folder"),
    ({"inputs": {"corpus": "x", "seed": 0}}, r"another inputs\.corpus"),
    ({"n_rows": 5}, "another n_rows"),
    ({"model_name": "other"}, "another model_name"),
    ({"vocab_size": 51}, "another vocab_size"),
    ({"points": Fake(OUTPUTS).points(2)}, r"another layers\.layers\.0\.is_topk|layers\.0\.kept"),
    ({"points": {0: Fake(OUTPUTS).points()[0]}}, r"another layers\.layers\.4"),
]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other, text", OTHERS)
def test_a_recording_of_something_else_is_refused(tmp_path, finished, other, text):
    if finished:
        recorded(Fake(OUTPUTS), tmp_path)
    else:
        with pytest.raises(InterruptedError):
            recorded(Fake(OUTPUTS, stop_at=2), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=text):
        recorded(Fake(OUTPUTS), tmp_path, **other)
    assert contents(tmp_path) == before


def test_another_corpus_than_the_one_begun_with_is_refused(tmp_path):
    with pytest.raises(InterruptedError):
        recorded(Fake(OUTPUTS, stop_at=2), tmp_path)
    changed = TOKENS.clone()
    changed[3, 2] += 1 if changed[3, 2] == 0 else -1
    with pytest.raises(DataError, match="row 3 of the corpus is not the one"):
        recorded(Fake(OUTPUTS), tmp_path, rows=changed)
    with pytest.raises(DataError, match="row 2 of the corpus is not the one"):
        recorded(Fake(OUTPUTS), tmp_path, rows=TOKENS[:2])


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something that is no recording"):
        recorded(Fake(OUTPUTS), tmp_path)
    with pytest.raises(ConfigError, match="is a file: give a folder"):
        recorded(Fake(OUTPUTS), tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_two_at_once_are_refused(tmp_path):
    def second(rows):
        with pytest.raises(ConfigError, match="is being recorded by another process"):
            recorded(Fake(OUTPUTS), tmp_path)

    recorded(Fake(OUTPUTS), tmp_path, on_progress=second)


@pytest.mark.parametrize("name", ["tokens", "layers.0.counts", "layers.4.values"])
def test_an_unfinished_recording_that_lost_something(tmp_path, name):
    with pytest.raises(InterruptedError):
        recorded(Fake(OUTPUTS, stop_at=2), tmp_path)
    path = tmp_path / UNFINISHED_NAME / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{name} is damaged .*: remove .* and record again"):
        recorded(Fake(OUTPUTS), tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"recording": 3}', '{"recording": {}, "rows": "many"}']
)
def test_progress_that_cannot_be_read(tmp_path, text):
    with pytest.raises(InterruptedError):
        recorded(Fake(OUTPUTS, stop_at=2), tmp_path)
    (tmp_path / UNFINISHED_NAME / "progress.json").write_text(text)
    with pytest.raises((DataError, ConfigError), match=r"progress\.json is damaged|was made with"):
        recorded(Fake(OUTPUTS), tmp_path)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk."""
    rows, length, width = 40, 16, 64
    y = sparse(width, rows=rows, length=length)
    tokens = (TOKENS.new_zeros(rows, length) + TOKENS.new_tensor(range(rows))[:, None]) % 50
    wanted = {"rows": tokens, "n_rows": rows, "row_length": length, "batch_rows": 1}
    monkeypatch.setattr(recorder, "SAVE_SECONDS", 0.0)
    recorded(Fake({0: y}, tokens), tmp_path / "whole", **wanted)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be written \(File too large\)"):
            recorded(Fake({0: y}, tokens), tmp_path / "out", **wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = Fake({0: y}, tokens)
    recorded(again, tmp_path / "out", **wanted)
    assert 0 < again.passes < rows
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
