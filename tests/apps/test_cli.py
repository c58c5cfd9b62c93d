"""What a user's mistake in a config or on a command line is answered with."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pytest

from apps.topk import cli, eval, quickstart, resume, train
from lingua_topk.errors import ConfigError
from tests.apps.tiny import write_config, write_corpus

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Inner:
    rate: float = 0.5
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class Outer:
    steps: int = 10
    inner: Inner = field(default_factory=Inner)
    maybe: Optional[Inner] = None  # noqa: UP045


def read(path, *argv):
    return cli.read_config(Outer, "the.program", "What it does.", argv=[f"config={path}", *argv])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: 20\ninner: {rate: 0.25}\n", encoding="utf-8")
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(file):
    args = read(file, "inner.rate=1e-3")
    assert (args.steps, args.inner.rate, args.inner.weights, args.maybe) == (20, 1e-3, {}, None)
    assert read(file, "maybe.rate=2").maybe.rate == 2
    assert read(file, "inner.weights.web=2").inner.weights == {"web": 2.0}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stepz=3", "stepz (in the command line) is no known key: did you mean steps?"),
        ("rate=3", "rate (in the command line) is no known key: did you mean inner.rate?"),
        ("inner.zzz=3", "allowed are rate, weights"),
        ("steps=ten", "steps (in the command line): Value 'ten' of type 'str' could not be"),
        ("inner=3", "inner (in the command line) has the wrong form"),
        ("maybe=3", "maybe (in the command line) has the wrong form"),
        ("inner.weights=[a]", "inner.weights (in the command line) has the wrong form"),
        ("steps", "argument 'steps' is not of the form key=value"),
        ("--steps=3", "argument '--steps=3' is not of the form key=value"),
        ("steps=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("inner.rate={", "the command line: "),
    ],
)
def test_a_wrong_argument_is_named(file, argument, message):
    with pytest.raises(ConfigError) as error:
        read(file, argument)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", "is not readable as YAML"),
        ("- a\n- b\n", "holds no mapping"),
        ("", "holds no mapping"),
        ("stepz: 3\n", "stepz (in {path}) is no known key: did you mean steps?"),
        ("steps: x\n", "steps (in {path}): Value 'x'"),
        ("\x00", "is not readable as YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    if not text:
        assert read(path).steps == 10  # an empty file changes no default
        return
    with pytest.raises(ConfigError) as error:
        read(path)
    assert message.format(path=path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a file: give the path of a YAML file"):
        read(tmp_path / "nowhere.yaml")


def test_help_shows_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.read_config(Outer, "the.program", "What it does.", argv=["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(part in text for part in ("the.program", "What it does.", "steps: 10", "rate: 0.5"))


@pytest.mark.parametrize("program", [train, eval])
def test_without_arguments_a_program_says_how_to_get_help(monkeypatch, capsys, program):
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        cli.run(program.main)
    assert ended.value.code == 2
    assert "--help" in capsys.readouterr().err


@pytest.mark.parametrize("program", [train, eval, quickstart])
def test_every_program_answers_help(monkeypatch, capsys, program):
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    try:
        cli.run(program.main)
    except SystemExit as ended:
        assert ended.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m {program.PROGRAM}")
    if program is train:
        assert "n_last_nontopk: 2" in text and "anneal_schedule: linear" in text


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m apps.topk.plan --help | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.stderr == "" and done.stdout.startswith("usage: ")


def test_an_error_of_a_user_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    def fails():
        raise ConfigError("x=1\nis\x1b[31m wrong")

    with pytest.raises(SystemExit) as ended:
        cli.run(fails)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: x=1 is [31m wrong\n"
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


MISTAKES = [
    ("dump_dir=", "dump_dir"),
    ("steps=0", "steps=0 is too small: give at least 1"),
    ("grad_acc_steps=0", "grad_acc_steps=0 is too small"),
    ("data.seq_len=0", "data.seq_len=0 is too small"),
    ("data.n_views=1", "data.n_views=1 is too small: give at least 2"),
    ("data.batch_size=0", "data.batch_size=0 is too small"),
    ("data.prefetch_size=0", "data.prefetch_size=0 is too small"),
    ("data.sources.nope=1.0", "nope is not a folder"),
    ("data.sources.text=-1", "weight -1.0 of text is not allowed"),
    ("data.root_dir=/nowhere", "text is not a folder in data.root_dir=/nowhere"),
    ("data.tokenizer.name=nope", "data.tokenizer.name='nope' is not known"),
    ("data.tokenizer.name=sp", "data.tokenizer.path is not set"),
    ("model.n_heads=3", "model.n_heads=3 does not divide model.dim=32"),
    ("model.vocab_size=10", "model.vocab_size=10 is smaller than the tokenizer's 258"),
    ("model.init_std_factor=big", "model.init_std_factor='big' is not known"),
    ("model.topk.k=0", "model.topk.k=0 is too small"),
    ("model.topk.n_last_nontopk=3", "model.topk.n_last_nontopk=3 leaves no TopK block"),
    ("model.topk.layers=[7]", "model.topk.layers=[7] names a block that this model of 3"),
    ("model.topk.site=mlpp", "model.topk.site='mlpp' is not known"),
    ("model.topk.activation=tanh", "model.topk.activation='tanh' is not known"),
    ("model.topk.anneal_ratio=2", "model.topk.anneal_ratio=2.0 is out of range"),
    ("model.topk.anneal_schedule=slow", "model.topk.anneal_schedule='slow' is not known"),
    ("model.topk.annealed=layers", "model.topk.annealed='layers' is not known"),
    ("optim.scheduler=nope", "optim.scheduler='nope' is not known"),
    ("optim.clip=0", "optim.clip=0.0 is not allowed"),
    ("distributed.dp_shard=3", "distributed.dp_shard=3 does not divide the 1 processes"),
    ("distributed.model_dtype=int8", "distributed.model_dtype='int8' is not known"),
    ("distributed.tp_size=2", "distributed.tp_size=2 is not offered"),
    ("checkpoint.dump.every=0", "checkpoint.dump.every=0 is too small"),
    ("checkpoint.dump.keep=-1", "checkpoint.dump.keep=-1 is too small: give at least 0"),
    ("model.topk.layers=[a]", "model.topk.layers[0] (in the command line): Value 'a'"),
    ("data.sources.a.b=1", "data.sources: weight {'b': 1} of a is not allowed"),
    ("eval.validation.windo=3", "eval.validation.windo (in the config) is no known key"),
    ("eval.validation.window=99", "validation.window=99 is not allowed"),
    ("eval.validation.sources=[nope]", "nope is neither a file nor a folder"),
    ("eval.dtype=int8", "dtype='int8' is not known"),
    ("save_at=[0]", "save_at=[0] is not allowed: give steps, counted from 1"),
    ("probe_freq=2", "probe_freq=2 is not offered by the embedded host"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A corpus, a config, and a finished run of two steps."""
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    config = write_config(root / "config.yaml")
    command = [
        sys.executable, "-m", "apps.topk.train", f"config={config}", f"data.root_dir={root}",
        f"dump_dir={root}/run", "steps=2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root, config


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_a_mistake_ends_training_before_anything_is_written(
    prepared, tmp_path, monkeypatch, capsys, mistake, message
):
    """Into a new folder, and into that of an earlier run."""
    root, config = prepared
    before = contents(root / "run")
    for dump_dir in (tmp_path / "new", root / "run"):
        argv = [f"config={config}", f"data.root_dir={root}", f"dump_dir={dump_dir}", "steps=3"]
        monkeypatch.setattr(sys, "argv", ["train", *argv, mistake])
        with pytest.raises(SystemExit) as ended:
            cli.run(train.main)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        if dump_dir == root / "run" and message not in line:
            # Or it is compared first with what the run has, under the name of the very key.
            key = line.removeprefix("error: ").partition("=")[0]
            assert mistake.startswith(key) and not resume._may_change(key)
            message_of_run = f", but the run in dump_dir={dump_dir} has "
            assert message_of_run in line
        else:
            assert message in line
    assert not (tmp_path / "new").exists()
    assert contents(root / "run") == before


@pytest.mark.parametrize(
    "argument", ["model.dim=64", "model.topk=null", "model.topk.k=5", "model.n_layers=4"]
)
def test_another_model_is_not_trained_on_in_the_folder_of_a_run(
    prepared, monkeypatch, capsys, argument
):
    root, config = prepared
    before = contents(root / "run")
    argv = [f"config={config}", f"data.root_dir={root}", f"dump_dir={root}/run", argument]
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main)
    assert ended.value.code == 2
    assert "to resume it, or another dump_dir to start a new run" in capsys.readouterr().err
    assert contents(root / "run") == before


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        ("/nowhere", [], "checkpoint.init_ckpt_path: /nowhere is not a distributed checkpoint"),
        ("{run}", ["model.dim=64"], "is of another model: layers.0.attention.wk.weight is"),
    ],
)
def test_initial_weights_that_do_not_fit_are_refused_before_anything_is_written(
    prepared, tmp_path, monkeypatch, capsys, path, overrides, message
):
    root, config = prepared
    path = path.format(run=root / "run" / "checkpoints" / "0000000002")
    argv = [f"config={config}", f"data.root_dir={root}", f"dump_dir={tmp_path}/new", *overrides]
    monkeypatch.setattr(sys, "argv", ["train", *argv, f"checkpoint.init_ckpt_path={path}"])
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_plain_run_does_not_begin_from_a_topk_model_unawares(prepared, tmp_path):
    from apps.main.train import TrainArgs
    from apps.main.train import train as train_plain

    root, _ = prepared
    args = TrainArgs(dump_dir=str(tmp_path / "new"), steps=1)
    args.data.root_dir, args.data.sources, args.data.seq_len = str(root), {"text": 1.0}, 32
    args.model.dim, args.model.n_layers, args.model.n_heads, args.model.multiple_of = 32, 3, 2, 16
    args.checkpoint.init_ckpt_path = str(root / "run" / "checkpoints" / "0000000002")
    with pytest.raises(Exception, match="is of a TopK model"):
        train_plain(args)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_named(prepared, monkeypatch, capsys):
    root, config = prepared
    argv = [f"config={config}", f"data.root_dir={root}", f"dump_dir={config}/run"]
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert f"dump_dir={config}/run or " in message and "cannot be written" in message
