"""Killed at any moment and run again, prepare ends with the bytes of a run that was not."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from apps.topk.corpus import work
from apps.topk.prepare import prepare
from lingua_topk.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
ENWIKI = ROOT.parent / "shared" / "data" / "enwiki.train.jsonl.xz"
N_TEXTS = 6_000


def texts(count: int = N_TEXTS) -> list[str]:
    noise = random.Random(0)
    words = ["river", "boat", "naïve", "the", "and", "of", "漢字", "sea", "\n", "wind"]
    return [
        f"{number % (count * 4 // 5)} " + " ".join(noise.choices(words, k=number % 90))
        for number in range(count)
    ]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in texts()]
    (folder / "a.jsonl").write_text("".join(lines[:4_000]) + "not JSON\n", encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(lines[4_000:]), encoding="utf-8")
    (folder / "c.txt").write_text("\n\n".join(texts(300)), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def often_saved(monkeypatch):
    """Saved half of the time: at the usual pace a corpus so small would be saved once."""
    monkeypatch.setattr(work, "SAVING_SHARE", 0.5)


def wanted(source, out, **arguments) -> dict:
    """With memory for about 130 kB of documents, of which there are 2 MB."""
    small = {"memory_mb": 1, "vocab_size": 300, "chunks": 3, "tokenizer_mb": 1}
    return {"source": str(source), "out": str(out), **small, **arguments}


def _run(arguments: dict) -> None:
    # A process that is killed keeps the lock that tqdm shares with its parent.
    tqdm.set_lock(threading.RLock())
    with open(os.devnull, "w") as nothing:
        sys.stdout = sys.stderr = nothing
        prepare(**arguments)


def started(arguments: dict) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments,))
    process.start()
    return process


def killed(process: multiprocessing.Process) -> bool:
    """Kill `process`; whether it had not ended by itself."""
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def result(out: Path) -> tuple[dict, dict]:
    """What was made: the bytes of the files, and the counts."""
    files = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = json.loads((out / "manifest.json").read_text())
    return files, {key: manifest[key] for key in ("inputs", "counts", "tokenizer", "files")}


def state(out: Path, part: str) -> dict:
    try:
        return json.loads((work.folder_of(out) / f"{part}.json").read_text())
    except FileNotFoundError:
        return {}


def test_killed_at_random_moments(source, tmp_path):
    whole = tmp_path / "whole"
    start = time.monotonic()
    prepare(**wanted(source, whole))
    duration = time.monotonic() - start
    noise, kills, read = random.Random(1), 0, 0
    for attempt in range(3):
        out = tmp_path / "killed" / str(attempt)
        while not (out / "manifest.json").exists():
            process = started(wanted(source, out))
            time.sleep(noise.uniform(0, duration / 2))
            kills += killed(process)
            if not (out / "manifest.json").exists():
                assert not out.exists()
                now = state(out, "reading").get("documents", 0)
                assert now >= read
                read = now
        # Killed after the last rename, its working folder is there still.
        prepare(**wanted(source, out))
        assert os.listdir(out.parent) == [str(attempt)]
        assert result(out) == result(whole)
        shutil.rmtree(out.parent)
        read = 0
    assert kills >= 6


def _reading(share: float):
    return lambda out: state(out, "reading").get("documents", 0) >= share * N_TEXTS


def _dealing(share: float):
    return lambda out: state(out, "dealing").get("bucket", 0) >= share * 1_024


@pytest.mark.parametrize(
    "moment",
    [
        _reading(0.1),
        _reading(0.7),
        _reading(1.04),
        lambda out: bool(state(out, "dealing")),
        _dealing(0.001),
        _dealing(0.3),
        _dealing(0.9),
        lambda out: any(work.folder_of(out).glob("new/*/*.val.jsonl")),
        lambda out: (work.folder_of(out) / "new" / "manifest.json").exists(),
    ],
    ids="read10 read70 read planned dealt0 dealt30 dealt90 held-out described".split(),
)
def test_killed_in_every_part(source, tmp_path, moment):
    prepare(**wanted(source, tmp_path / "whole"))
    out = tmp_path / "out"
    process = started(wanted(source, out))
    while process.is_alive() and not moment(out):
        time.sleep(0.0002)
    killed(process)
    prepare(**wanted(source, out))
    assert result(out) == result(tmp_path / "whole")


def test_killed_while_it_replaces(source, tmp_path):
    out = tmp_path / "out"
    prepare(**wanted(source, out))
    before = result(out)
    changed = wanted(source, out, seed=7, overwrite=True)
    process = started(changed)
    while not state(out, "dealing").get("bucket"):
        time.sleep(0.001)
    killed(process)
    assert result(out) == before
    # It goes on, although it would replace what is there.
    prepare(**changed)
    prepare(**wanted(source, tmp_path / "whole", seed=7))
    assert result(out) == result(tmp_path / "whole")


@pytest.fixture
def interrupted(source, tmp_path):
    """The `out` of a run that was killed when it had begun to write."""
    out = tmp_path / "out"
    process = started(wanted(source, out))
    while not state(out, "dealing").get("bucket"):
        time.sleep(0.001)
    assert killed(process)
    return out


def test_it_says_that_it_goes_on(source, interrupted, capsys):
    prepare(**wanted(source, interrupted))
    assert capsys.readouterr().err.startswith("going on with an interrupted run: 6,0")
    assert not work.folder_of(interrupted).exists()


def test_other_inputs_are_refused_and_nothing_is_touched(source, interrupted, capsys):
    with pytest.raises(ConfigError) as error:
        prepare(**wanted(source, interrupted, seed=7))
    assert "seed=7 (there: 42); give those to go on with it, or --overwrite" in str(error.value)
    assert state(interrupted, "dealing")["bucket"]
    prepare(**wanted(source, interrupted, seed=7, overwrite=True))
    assert "left by an interrupted run with other inputs" in capsys.readouterr().err


def test_changed_sources_are_refused(source, interrupted):
    with open(source / "b.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match=r"the files of .*/text, which changed since"):
        prepare(**wanted(source, interrupted))


@pytest.mark.parametrize(
    "changed", [{"chunks": 2}, {"val_share": 0.2}, {"name": "x"}, {"memory_mb": 100}]
)
def test_what_was_read_serves_other_arguments(source, interrupted, tmp_path, changed, capsys):
    prepare(**wanted(source, interrupted, **changed))
    assert "are read" in capsys.readouterr().err
    prepare(**wanted(source, tmp_path / "whole", **changed))
    assert result(interrupted) == result(tmp_path / "whole")


def test_another_tokenizer_leaves_the_documents(source, interrupted, tmp_path):
    bucket = state(interrupted, "dealing")["bucket"]
    with pytest.raises(DataError, match="vocab_size=900000 is more"):
        prepare(**wanted(source, interrupted, vocab_size=900_000))
    assert state(interrupted, "dealing")["bucket"] >= bucket
    prepare(**wanted(source, interrupted, vocab_size=310))
    prepare(**wanted(source, tmp_path / "whole", vocab_size=310))
    assert result(interrupted) == result(tmp_path / "whole")


def test_documents_that_were_cut_short_are_noticed(source, interrupted):
    os.truncate(work.folder_of(interrupted) / "documents", 1_000)
    with pytest.raises(DataError, match="is shorter than what was written to it: remove"):
        prepare(**wanted(source, interrupted))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_says_so(tmp_path, number, status):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text("".join(f'{{"text": "number {n}"}}\n' for n in range(400_000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "apps.topk.prepare", "--source", str(source), "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (work.folder_of(out) / "documents").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    printed, said = process.communicate()
    assert (printed, said) == ("", "stopped: the same command goes on from here\n")
    assert process.returncode == status
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.skipif(not ENWIKI.exists(), reason=f"needs {ENWIKI.name} beside the checkout")
def test_the_command_is_killed_again_and_again(tmp_path):
    """At its own pace: the program as it is, on 52 MB of text."""
    out, whole, noise = tmp_path / "out", tmp_path / "whole", random.Random(2)

    def command(folder: Path) -> list[str]:
        flags = ["--source", str(ENWIKI), "--out", str(folder), "--vocab_size", "0"]
        return [sys.executable, "-m", "apps.topk.prepare", *flags, "--memory_mb", "64"]

    subprocess.run(command(whole), cwd=ROOT, check=True, capture_output=True)
    for _ in range(5):
        process = subprocess.Popen(command(out), cwd=ROOT, stderr=subprocess.DEVNULL)
        time.sleep(noise.uniform(2, 5))
        process.kill()
        process.wait()
    subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True)
    assert result(out) == result(whole)
