"""A disk without room: nothing of before is lost, one line says so, and with room it goes on."""

import json
import logging
import shutil

import pytest
from safetensors.numpy import load_file

from apps.topk import analyze, cli, export, prepare, report
from apps.topk.corpus import work
from apps.topk.eval import EvalArgs, launch_eval
from lingua._manifest import find_damage
from lingua.checkpoint import CheckpointManager, consolidate_checkpoints
from lingua.errors import CheckpointError, UserError
from lingua.logger import init_logger
from lingua.metrics import MetricLogger
from tests import processes
from tests.apps.real_text import train_on, write_stories
from tests.faults.runs import checkpoints, errors, long, result, start, status_of


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(corpus, folder) == 0
    return folder


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fill_before_save(monkeypatch, disk, number, left):
    """The disk is full from the `number`th save on."""
    save, saves = CheckpointManager.save, []

    def with_full_disk(self, *args, **kwargs):
        saves.append(None)
        if len(saves) == number:
            disk.fill(left)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(CheckpointManager, "save", with_full_disk)


@pytest.mark.parametrize("share", [0.3, *long(0, 0.97)])
def test_a_checkpoint_that_has_no_room(corpus, whole, small_disk, monkeypatch, capfd, share):
    """Of the checkpoint's bytes, `share` have room: nothing, a part of the weights, all of them."""
    disk = small_disk(8_000_000)
    folder, size = disk.path / "run", size_of(whole / "checkpoints/0000000004")
    with monkeypatch.context() as patch:
        fill_before_save(patch, disk, 2, int(share * size))
        assert start(corpus, folder) == 2
        (line,) = errors(capfd.readouterr().err)
        assert f"{folder}/checkpoints/0000000004 cannot be written" in line
        assert "No space left on device" in line and "free or mend the disk, then start" in line
    assert checkpoints(folder) == ["0000000002"]
    assert find_damage(folder / "checkpoints/0000000002") is None

    disk.fill(0)
    assert start(corpus, folder) == 2
    text = capfd.readouterr().err
    assert len(errors(text)) == 1 and str(folder) in errors(text)[0] and "Traceback" not in text
    assert checkpoints(folder) == ["0000000002"]

    disk.free()
    assert start(corpus, folder) == 0
    assert result(folder) == result(whole)


def test_a_record_is_written_whole_or_not_at_all(small_disk):
    disk = small_disk(1_000_000)
    path = disk.path / "metrics.jsonl"
    with MetricLogger(path) as log:
        log.log({"global_step": 0})
        disk.fill(8192)
        with pytest.raises(UserError, match=f"{path} cannot be written .No space left.*make room"):
            for step in range(1, 100_000):
                log.log({"global_step": step})
        n = len(path.read_text(encoding="utf-8").splitlines())
        disk.free()
        log.log({"global_step": n})
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["global_step"] for line in lines] == list(range(n + 1)) and n > 50


def test_a_log_without_room_says_so_once(small_disk, capfd):
    disk = small_disk(1_000_000)
    path, log = disk.path / "train.log", logging.getLogger("full_disk")
    log.propagate = False
    init_logger(path, name=log.name)
    disk.fill(0)
    for i in range(200):
        log.info("%d %s", i, "x" * 100)
    init_logger(name=log.name)  # closes the file
    text = capfd.readouterr()
    assert text.out.count("x" * 100) == 200
    assert text.err == f"warning: {path} cannot be written: No space left on device\n"


@pytest.mark.long
def test_what_one_process_cannot_write_ends_all_of_them(corpus, tmp_path):
    """None is left waiting for another: each ends by itself, with the same error."""
    done = processes.run(2, "tests.faults.unwritable", corpus, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    ended = [json.loads((tmp_path / f"{rank}.json").read_text("utf-8")) for rank in range(2)]
    assert ended[0].keys() == ended[1].keys()
    for name, (status, said) in ended[0].items():
        assert (status, said) == tuple(ended[1][name]), name
        assert status == 2 and "No space left on device" in said, (name, said)
        assert checkpoints(tmp_path / name) == ([] if name == "config" else ["0000000002"])
    assert len(ended[0]) == 8


def tree(folder, *but):
    """The files below it by name; those of which only the names count, without content."""
    return {
        str(path.relative_to(folder)): None if path.name in but else content(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def content(path):
    """The bytes; of safetensors' files without their header, whose order is by chance."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    return {name: x.tobytes() for name, x in load_file(path).items()}


def is_refused_for_want_of_room(program, capfd, place):
    """It ends with status 2 and one line, which names the place and what to do."""
    capfd.readouterr()
    assert status_of(program) == 2
    text = capfd.readouterr().err
    (line,) = errors(text)
    assert "Traceback" not in text
    assert str(place) in line and "No space left on device" in line
    assert any(words in line for words in ("run again", "run it again", "choose another", "give"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    lines = (json.dumps({"text": f"{i} " + "river boat sea wind " * (i % 30)}) for i in range(2000))
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("left", [200_000, 600_000, *long(0, 900_000)])
def test_preparation(texts, tmp_path, small_disk, monkeypatch, capfd, left):
    """Full while it reads, while it deals the documents out, and at its end."""
    monkeypatch.setattr(work, "SAVING_SHARE", 0.5)
    words = ["--source", str(texts), "--name", "a", "--memory_mb", "1", "--chunks", "2",
             "--vocab_size", "0"]  # fmt: skip

    def program(out):
        return lambda: prepare.main([*words, "--out", str(out)])

    assert status_of(program(tmp_path / "whole")) == 0
    disk = small_disk(4_000_000)
    disk.fill(left)
    is_refused_for_want_of_room(program(disk.path / "out"), capfd, disk.path / "out")
    assert not (disk.path / "out").exists()
    disk.free()
    assert status_of(program(disk.path / "out")) == 0
    but = ("manifest.json",)
    assert tree(disk.path / "out", *but) == tree(tmp_path / "whole", *but)
    assert [path.name for path in disk.path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = write_stories(tmp_path_factory.mktemp("stories"))
    train_on(root, root / "run", "steps=2")
    return root / "run"


def analysis(trained, out):
    few = ["--tokens", "2000", "--min_words", "3", "--contexts", "2", "--device", "cpu", "--quiet"]
    return lambda: analyze.main(["--ckpt", str(trained), "--out", str(out), *few])


@pytest.fixture(scope="module")
def analysed(trained):
    assert status_of(analysis(trained, trained / "neurons")) == 0
    return trained / "neurons"


@pytest.mark.parametrize("share", [0.93, *long(0.05, 0.5)])
def test_recording(trained, analysed, small_disk, capfd, share):
    """Full while it records, while it measures, and while it writes what comes of that."""
    disk = small_disk(8_000_000)
    disk.fill(int(share * size_of(analysed)))
    out = disk.path / "out"
    is_refused_for_want_of_room(analysis(trained, out), capfd, out)
    assert not (out / "analysis.json").exists()
    disk.free()
    assert status_of(analysis(trained, out)) == 0
    but = ("analysis.json", "entropy.svg", "comparison.md")
    assert tree(out, *but) == tree(analysed, *but)


def test_consolidating(whole, small_disk):
    disk = small_disk(8_000_000)
    shutil.copytree(whole / "checkpoints/0000000004", disk.path / "0000000004")
    before = tree(disk.path)
    disk.fill(100_000)
    with pytest.raises(CheckpointError, match=r"consolidated cannot be written: .*No space left"):
        consolidate_checkpoints(disk.path / "0000000004")
    disk.free()
    assert tree(disk.path) == before
    consolidate_checkpoints(disk.path / "0000000004")


def test_reporting(analysed, small_disk, capfd):
    disk = small_disk(8_000_000)
    out = disk.path / "report.html"
    program = lambda: report.main(["--run", str(analysed), "--out", str(out)])  # noqa: E731
    assert status_of(program) == 0
    before = out.read_bytes()
    disk.fill(len(before) // 2)
    is_refused_for_want_of_room(program, capfd, out)
    assert out.read_bytes() == before
    assert {path.name for path in disk.path.iterdir()} == {"report.html", ".ballast"}
    disk.free()
    assert status_of(program) == 0


def test_evaluation(trained, small_disk, capfd):
    disk = small_disk(8_000_000)
    args = cli.merge(
        EvalArgs,
        (cli.dot_list([f"ckpt_dir={trained}/checkpoints/0000000002",
                       f"dump_dir={disk.path}/out", "validation.context=8"]), "here"),
    )  # fmt: skip
    disk.fill(4096 * 2)
    is_refused_for_want_of_room(lambda: launch_eval(args), capfd, f"{disk.path}/out")
    assert not (disk.path / "out/provenance.json").exists()
    disk.free()
    assert status_of(lambda: launch_eval(args)) == 0
    assert (disk.path / "out/validation.json").is_file()


def test_export(trained, small_disk, capfd):
    disk = small_disk(8_000_000)
    out = disk.path / "hf"
    words = ["--ckpt", f"{trained}/checkpoints/0000000002", "--out", str(out),
             "--as_trained", "true", "--tokenizer", "false"]  # fmt: skip
    disk.fill(60_000)
    is_refused_for_want_of_room(lambda: export.main(words), capfd, out)
    assert {path.name for path in disk.path.iterdir()} == {".ballast"}
    disk.free()
    assert status_of(lambda: export.main(words)) == 0
    assert (out / "model.safetensors").is_file()
