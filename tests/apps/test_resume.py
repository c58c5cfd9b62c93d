"""What a run that goes on may change, and its records as of the checkpoint it goes on from."""

import json
import logging
import shutil

import pytest

from apps.topk import resume
from apps.topk.records import trim_records
from apps.topk.train import train
from lingua_topk.errors import ConfigError
from tests.apps.tiny import read_metrics, train_args, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(train_args(corpus, folder, "steps=6", "checkpoint.dump.every=2"))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A run of 6 steps that was saved at 2, 4 and 6; its paths are its own."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optim.lr=0.5", "optim.lr=0.5, but the run in dump_dir={run} has 0.01"),
        ("optim.warmup=3", "optim.warmup=3, but the run in dump_dir={run} has 5"),
        ("optim.scheduler=wsd", "optim.scheduler=wsd, but the run in dump_dir={run} has cosine"),
        ("seed=8", "seed=8, but the run in dump_dir={run} has 7"),
        ("grad_acc_steps=2", "grad_acc_steps=2, but"),
        ("data.batch_size=2", "data.batch_size=2, but the run in dump_dir={run} has 4"),
        ("data.seq_len=16", "data.seq_len=16, but the run in dump_dir={run} has 32"),
        ("data.seed=1", "data.seed=1, but the run in dump_dir={run} has 42"),
        ("data.prefetch_size=2", "data.prefetch_size=2, but"),
        ("data.add_bos=false", "data.add_bos=False, but the run in dump_dir={run} has True"),
        ("data.sources.text=2.0", "data.sources={'text': 2.0}, but"),
        ("data.root_dir=/nowhere", "data.root_dir=/nowhere, but"),
        ("data.tokenizer.name=tiktoken", "data.tokenizer.name=tiktoken, but"),
        ("model.dim=64", "model.dim=64, but the run in dump_dir={run} has 32"),
        ("model.seed=1", "model.seed=1, but"),
        ("model.topk.k=5", "model.topk.k=5, but the run in dump_dir={run} has 4"),
        ("model.topk.anneal_ratio=0", "model.topk.anneal_ratio=0.0, but"),
        ("model.topk=null", "makes a plain model, but the run in dump_dir={run} is of a TopK"),
        ("distributed.model_dtype=bf16", "distributed.model_dtype=bf16, but"),
    ],
)
def test_what_makes_another_run_is_refused_with_both_values(corpus, run, change, said):
    before = contents(run)
    args = train_args(corpus, run, "steps=9", "checkpoint.dump.every=2", change)
    with pytest.raises(ConfigError) as caught:
        train(args)
    assert said.replace("{run}", str(run)) in str(caught.value)
    assert "another dump_dir" in str(caught.value)
    assert contents(run) == before


def test_a_plain_run_is_not_made_a_topk_one(corpus, tmp_path):
    plain = train_args(corpus, tmp_path / "run", "steps=1", "model.topk=null")
    train(plain)
    with pytest.raises(ConfigError, match=r"makes a TopK model, but the run .* is of a plain"):
        train(train_args(corpus, tmp_path / "run", "steps=2"))


def test_what_may_change_does_and_is_logged(corpus, run):
    allowed = ["logging.freq=2", "checkpoint.dump.keep=1", "name=other", "gc_collect_freq=5"]
    train(train_args(corpus, run, "steps=8", "checkpoint.dump.every=4", *allowed))
    assert [line["global_step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6, 8]
    log = (run / "train.log").read_text(encoding="utf-8")
    for change in ("steps: 6 -> 8", "logging.freq: 1 -> 2", "name: lingua -> other"):
        assert f"changed since the checkpoint: {change}" in log
    assert "alpha is 0 from step 4 on" in log


def test_a_path_written_otherwise_is_the_same_path(corpus, run):
    roundabout = corpus / "text" / ".."
    args = train_args(corpus, run, "steps=7", f"data.root_dir={roundabout}")
    changed = resume.check_unchanged(args)
    assert changed and not any(line.startswith("data.") for line in changed)


def test_records_hold_each_step_once(corpus, run):
    """Killed after step 6 was logged and before it was saved."""
    shutil.rmtree(run / "checkpoints" / "0000000006")
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text(encoding="utf-8")
    with open(metrics, "a", encoding="utf-8") as file:
        file.write('{"global_step": 7, "half a li')
    train(train_args(corpus, run, "steps=6", "checkpoint.dump.every=2"))
    repeated = read_metrics(run)
    assert [line["global_step"] for line in repeated] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(repeated, map(json.loads, whole.splitlines()), strict=True):
        assert (line["loss/out"], line["topk/l0/0"]) == (other["loss/out"], other["topk/l0/0"])


def test_records_of_a_run_that_never_saved_begin_anew(corpus, run):
    shutil.rmtree(run / "checkpoints")
    train(train_args(corpus, run, "steps=3"))
    assert [line["global_step"] for line in read_metrics(run)] == [1, 2, 3]


def test_what_is_counted_between_log_lines_survives(corpus, tmp_path):
    """Saved in the middle of what one line of metrics.jsonl reports."""
    often = ["logging.freq=4", "checkpoint.dump.every=2", "steps=8"]
    train(train_args(corpus, tmp_path / "whole", *often))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in (8, 4):
        shutil.rmtree(tmp_path / "run/checkpoints" / f"{step:010d}")
    shutil.rmtree(tmp_path / "run/checkpoints/0000000006")
    train(train_args(corpus, tmp_path / "run", *often))
    for line, other in zip(
        read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole"), strict=True
    ):
        assert {k: v for k, v in line.items() if k.startswith("topk/")} == {
            k: v for k, v in other.items() if k.startswith("topk/")
        }


@pytest.mark.parametrize(
    ("lines", "step", "kept"),
    [
        ([{"global_step": 1}, {"global_step": 2}, {"global_step": 3}], 2, 2),
        ([{"global_step": 2, "acc_step": 0}, {"global_step": 2, "acc_step": 1}], 2, 1),
        ([{"global_step": 5}], 0, 0),
        (["somebody's note", {"global_step": 1}, {"global_step": 9}], 1, 2),
        ([{"other": 1}, [1], {"global_step": 2}], 1, 2),
        ([], 3, 0),
    ],
)
def test_lines_after_a_step_are_dropped(tmp_path, lines, step, kept):
    path = tmp_path / "metrics.jsonl"
    text = [json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(text) + '{"global_step": 1, "cut', encoding="utf-8")
    trim_records(tmp_path, step)
    assert path.read_text(encoding="utf-8") == "".join(text[:kept])


def test_weights_of_the_other_kind_are_said_to_be_so(corpus, run, tmp_path, caplog):
    weights = f"checkpoint.init_ckpt_path={run}/checkpoints/0000000006"
    args = train_args(corpus, tmp_path / "new", weights, "model.topk=null")
    with caplog.at_level(logging.WARNING):
        resume.log_start(args, [])
    assert "are of a TopK model (k=4); this run makes a plain one" in caplog.text


@pytest.mark.parametrize(
    ("processes", "change", "said"),
    [
        (2, ["data.batch_size=2"], None),
        (4, ["data.batch_size=1"], None),
        (2, ["data.batch_size=1", "grad_acc_steps=2"], None),
        (2, [], "processes: 1 -> 2, and with them the sequences of a step, 4 -> 8"),
        (2, ["data.batch_size=3"], ConfigError),
        (1, ["data.batch_size=2", "grad_acc_steps=2"], ConfigError),
    ],
)
def test_with_other_processes_a_step_may_keep_its_sequences(
    corpus, run, monkeypatch, processes, change, said
):
    monkeypatch.setattr(resume, "get_world_size", lambda: processes)
    args = train_args(corpus, run, "steps=9", "checkpoint.dump.every=2", *change)
    if said is ConfigError:
        with pytest.raises(ConfigError, match=r"but the run in dump_dir"):
            resume.check_unchanged(args)
        return
    lines = resume.check_unchanged(args)
    assert (
        any(said in line for line in lines)
        if said
        else not any(x.startswith("processes") for x in lines)
    )
