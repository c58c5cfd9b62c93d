"""apps.topk.generate on trained checkpoints: the command, its mistakes, and transformers."""

import io
import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from apps.topk import export, generate, generation, terminal
from apps.topk.checkpoint import newest_checkpoint, open_checkpoint
from apps.topk.generation import Generation, Generator
from apps.topk.sampling import MAX_SEED, Sampling
from apps.topk.train import train
from lingua_topk.errors import CheckpointError, ConfigError
from lingua_topk.hf import register
from lingua_topk.hf.modeling_topk_lm import TopKLMRMSNorm
from lingua_topk.sparse import SparseDecoding
from tests.apps.tiny import train_args, write_corpus

KINDS = {
    "topk": (),
    "mlp": ("model.topk.site=mlp", "model.n_kv_heads=1", "model.weight_tying=true"),
    "twin": ("model.topk=null",),
}
PROMPTS = ["The quick", "A stream of water", "Every", ""]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The dump_dir of a run of each kind."""
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("runs")
    for kind, overrides in KINDS.items():
        anneal = () if kind == "twin" else ("model.topk.anneal_ratio=0.75",)
        train(train_args(root, folder / kind, "steps=20", *overrides, *anneal))
    # A model with room for a text that takes a while.
    train(train_args(root, folder / "long", "steps=1", "data.seq_len=2048", "data.batch_size=1"))
    logging.getLogger().handlers[:] = []
    return folder


def run(*arguments):
    generate.main([str(argument) for argument in arguments])


def piped(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_are_those_of_transformers(runs, kind, tmp_path):
    register()
    export.main(["--ckpt", str(newest_checkpoint(runs / kind)), "--out", str(tmp_path / "hf")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    if kind == "twin":  # Llama's norm computes in float32 whatever its input
        for name, module in list(theirs.named_modules()):
            if isinstance(module, LlamaRMSNorm):
                norm = TopKLMRMSNorm(len(module.weight), module.variance_epsilon)
                norm.weight = module.weight
                theirs.set_submodule(name, norm)
    checkpoint = open_checkpoint(newest_checkpoint(runs / kind))
    ours = Generator(checkpoint.model("cpu", torch.float64), checkpoint.tokenizer())
    found = ours.generate(PROMPTS, Sampling(max_tokens=14))
    for prompt, one in zip(PROMPTS, found, strict=True):
        x = torch.tensor([ours.encode(prompt)])
        expected = theirs.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=14, do_sample=False,
            suppress_tokens=[256], eos_token_id=257,
        )[0, x.shape[1] :].tolist()  # fmt: skip
        assert one.tokens + [257] * (one.reason == "eos") == expected


def test_a_single_text_is_shown_with_its_prompt(runs, capsys):
    run("--ckpt", runs / "topk", "--prompt", "The quick", "--max_tokens", 9)
    out = capsys.readouterr().out
    checkpoint = open_checkpoint(newest_checkpoint(runs / "topk"))
    generator = Generator(checkpoint.model("cpu", torch.float32), checkpoint.tokenizer())
    text = generator.generate(["The quick"], Sampling(max_tokens=9))[0].text
    assert out == terminal.shown("The quick" + text) + "\n"
    run("--ckpt", newest_checkpoint(runs / "topk"), "--prompt=The quick", "--max-tokens=9")
    assert capsys.readouterr().out == out


def test_sparse_decoding_can_be_turned_off(runs, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        generation, "SparseDecoding", lambda model: seen.append(SparseDecoding(model)) or seen[-1]
    )
    arguments = ("--ckpt", runs / "topk", "--prompt", "The quick")
    arguments += ("--max_tokens", generation.SPARSE_FROM)
    run(*arguments, "--dtype", "fp64")
    assert len(seen) == 1 and seen[0].layers
    run(*arguments, "--dtype", "fp64", "--sparse", "False")
    out = capsys.readouterr().out
    assert out == 2 * out[: len(out) // 2]
    assert len(seen) == 1


def test_several_prompts_and_completions(runs, capsys, tmp_path):
    arguments = ("--ckpt", runs / "topk", "--prompt", "A,b", "--prompt", "--prompt", "--prompt=x")
    with pytest.raises(ConfigError, match="--prompt needs a value"):
        run(*arguments)
    arguments = ("--ckpt", runs / "topk", "--prompt", "A,b", "--prompt=", "--prompt=--x")
    drawn = ("--num", 2, "--temperature", 1, "--max_tokens", 6, "--seed", 5)
    run(*arguments, *drawn)
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("=== ")]
    assert [head.partition(" (")[0] for head in heads] == [
        f"=== prompt {i} of 3, completion {j} of 2" for i in (1, 2, 3) for j in (1, 2)
    ]
    run(*arguments, *drawn, "--json", tmp_path / "out.jsonl")
    assert capsys.readouterr().out == f"written: {tmp_path / 'out.jsonl'} (6 texts)\n"
    lines = read(tmp_path / "out.jsonl")
    assert [(line["index"], line["completion"], line["prompt"]) for line in lines] == [
        (i, j, prompt) for i, prompt in enumerate(["A,b", "", "--x"]) for j in (0, 1)
    ]
    assert lines[0]["text"] != lines[1]["text"]
    assert set(lines[0]) == {"index", "completion", "prompt", "text", "tokens", "reason"}
    # With fewer completions the first are the same.
    run(*arguments, *drawn[2:], "--json", tmp_path / "one.jsonl")
    assert read(tmp_path / "one.jsonl") == lines[::2]
    origin = json.loads((tmp_path / "out.jsonl.provenance.json").read_text(encoding="utf-8"))
    assert origin["step"] == 20 and origin["sampling"]["seed"] == 5
    assert len(list(tmp_path.iterdir())) == 4


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_from_files_and_pipes(runs, tmp_path, monkeypatch):
    (tmp_path / "some.txt").write_bytes("\ufeffone\r\n\n  \ntwo\u2028three\n".encode())
    lines = ['"a\\nb"', '{"prompt": "", "more": 1}', '"\\ud800"']
    (tmp_path / "some.jsonl").write_text("\n".join(lines), encoding="utf-8")
    short = ("--ckpt", runs / "topk", "--max_tokens", 1, "--json")
    run(*short, tmp_path / "1", "--prompt", "zero", "--prompts", tmp_path / "some.txt")
    run(*short, tmp_path / "2", "--prompts", tmp_path / "some.jsonl")
    piped(monkeypatch, b"one\n\ntwo")
    run(*short, tmp_path / "3")
    found = [[line["prompt"] for line in read(tmp_path / name)] for name in "123"]
    assert found == [["zero", "one", "two\u2028three"], ["a\nb", "", "\ufffd"], ["one", "two"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompt in the standard input"),
        (b"\n \n", "no prompt in the standard input"),
        (b"one\ntwo\xff\n", "the standard input: line 2 is not UTF-8"),
    ],
)
def test_pipes_without_prompts(runs, monkeypatch, content, message):
    piped(monkeypatch, content)
    with pytest.raises(ConfigError, match=message):
        run("--ckpt", runs / "topk")


@pytest.mark.parametrize("content", ["5", "{}", '{"prompt": 5}', "plain", "[" * 99999])
def test_lines_that_are_no_prompts(runs, tmp_path, content):
    (tmp_path / "some.jsonl").write_text(f'"fine"\n{content}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="neither a JSON string nor an object"):
        run("--ckpt", runs / "topk", "--prompts", tmp_path / "some.jsonl")


MISTAKES = [
    (["--temprature", "1"], "--temprature is no known flag: did you mean temperature?"),
    (["--temperature", "-1"], "temperature=-1.0 is not allowed"),
    (["--temperature", "nan"], "temperature=nan is not allowed"),
    (["--temperature", "warm"], "--temperature='warm' is not a number"),
    (["--top_p", "0"], "top_p=0.0 is not allowed"),
    (["--top_p", "2"], "top_p=2.0 is not allowed"),
    (["--top_k", "-1"], "top_k=-1 is not allowed"),
    (["--max_tokens", "0"], "max_tokens=0 is not allowed"),
    (["--seed", "-1"], "seed=-1 is not allowed"),
    (["--stop", ""], r"stop=\('',\) is not allowed"),
    (["--stop"], "--stop needs a value"),
    (["--num", "0"], "num=0 is not allowed"),
    (["--num", "2"], "num=2 with temperature=0 would give the same text 2 times"),
    (["--dtype", "int8"], "dtype='int8' is not known"),
    (["--device", "gpu"], "device='gpu' is not known"),
    (["--device", "meta"], "device='meta' is not known"),
    (["--device", "cuda:99"], "device='cuda:99' is not there"),
    (["--batch_tokens", "0"], "batch_tokens=0 is not allowed"),
    (["--prompts", "nowhere.txt"], "prompts=nowhere.txt cannot be read"),
    (["--prompts", "."], r"prompts=\. cannot be read"),
    (["--json", "/nowhere/out.jsonl"], "/nowhere is no folder"),
    (["--json", "."], "is there already"),
    (["--prompt", "x" * 40], r"prompts\[1\] has 41 tokens, and the model reads 31 at most"),
    (["stray"], "argument 'stray' belongs to no flag"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(runs, arguments, message, capsys):
    with pytest.raises(ConfigError, match=message) as error:
        run("--ckpt", runs / "topk", "--prompt", "The", *arguments)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_a_long_prompt_alone_is_not_shown(runs, capsys):
    with pytest.raises(ConfigError, match="41 tokens"):
        run("--ckpt", runs / "topk", "--prompt", "x" * 40)
    assert capsys.readouterr().out == ""


def test_checkpoints_that_are_not_there(tmp_path, capsys):
    for folder in ("", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError):
            run(f"--ckpt={folder}", "--prompt", "The")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        run("--ckpt", tmp_path, "--prompt", "The")
    with pytest.raises(ConfigError, match="needs flags, for example --ckpt"):
        run("--prompt", "The")


def test_a_file_that_is_there_is_left_alone(runs, tmp_path):
    for name in ("out", "out.provenance.json"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
        with pytest.raises(ConfigError, match="is there already"):
            run("--ckpt", runs / "topk", "--prompt", "The", "--json", tmp_path / "out")
        assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["mine"]
        (tmp_path / name).unlink()


def test_nothing_is_left_of_results_that_cannot_be_written(runs, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        run("--ckpt", runs / "topk", "--prompt", "The", "--json", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    run("--prompt", "--help")
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m apps.topk.generate --ckpt") and "$'\\n'" in out


def test_inside_the_annealing_phase(runs, tmp_path, caplog):
    inside = sorted((runs / "topk" / "checkpoints").iterdir())[0]
    checkpoint = open_checkpoint(inside)
    assert checkpoint.alpha > 0
    for flag in ("false", "true"):
        run("--ckpt", inside, "--prompt", "The", "--as_trained", flag, "--max_tokens", 2)
    used = [record.args[-1] for record in caplog.records if "annealing" in record.message]
    assert used == [0.0, checkpoint.alpha]


def test_a_mistake_ends_with_status_2_and_one_line(runs):
    done = subprocess.run(
        [sys.executable, "-m", "apps.topk.generate", "--ckpt", str(runs / "topk"), "--top_p", "2"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: top_p=2.0") and done.stderr.count("\n") == 1


# The terminal.


def test_control_characters_are_shown_and_not_sent(monkeypatch):
    text = "a\n\tb\x1b[31m\r\x07\x00\x7f\x9b漢🙂\u202ex\u2069\ud800é"
    expected = r"\x1b[31m\x0d\x07\x00\x7f\x9b漢🙂\u202ex\u2069\ud800é"
    assert terminal.shown(text) == "a\n\tb" + expected
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    terminal.write("é\x1b")
    assert sys.stdout.buffer.getvalue() == rb"\xe9\x1b"


def test_control_characters_stay_in_json_and_not_on_the_terminal(
    runs, tmp_path, capsys, monkeypatch
):
    one = Generation("The", "\x1b[2J\r", [27], "length")
    monkeypatch.setattr(Generator, "generate", lambda *_args, **_kwargs: [one, one])
    two = ("--ckpt", runs / "topk", "--prompt", "The", "--prompt", "The")
    run(*two)
    out = capsys.readouterr().out
    assert r"The\x1b[2J\x0d" in out and "\x1b" not in out
    run(*two, "--json", tmp_path / "out")
    assert read(tmp_path / "out")[0]["text"] == "\x1b[2J\r"


class Pieces:
    """In place of a Generator: the pieces of each prompt, or what is raised in between."""

    def __init__(self, **answers):
        self.answers, self.seeds = answers, []

    def encode(self, prompt):
        return list(prompt)

    def check(self, ids):
        if len(ids) > 9:
            raise ConfigError("too long")

    def generate(self, prompts, sampling, on_text):
        self.seeds.append(sampling.seed)
        for piece in self.answers[prompts[0]]:
            if isinstance(piece, type):
                raise piece
            on_text(0, piece)


def converse(monkeypatch, pieces, *lines):
    todo = list(lines)

    def enter(_prompt):
        line = todo.pop(0)
        if isinstance(line, type):
            raise line if line is not UnicodeDecodeError else line("utf-8", b"\xff", 0, 1, "bad")
        return line

    monkeypatch.setattr("builtins.input", enter)
    terminal.converse(pieces, Sampling(seed=MAX_SEED))
    assert not todo


def test_a_conversation(monkeypatch, capsys):
    pieces = Pieces(a=["b", "\x1bc"], d=["e", KeyboardInterrupt, "f"])
    interrupted = (KeyboardInterrupt, UnicodeDecodeError)
    converse(monkeypatch, pieces, "a", *interrupted, "d", "x" * 10, "a", EOFError)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "ab\\x1bc", "", "that was not UTF-8", "de", "(stopped)", "too long", "ab\\x1bc", "",
    ]  # fmt: skip
    assert pieces.seeds == [MAX_SEED, 0, 2]
    converse(monkeypatch, pieces, "")


def test_a_conversation_takes_one_text_a_line(runs, monkeypatch):
    piped(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    for extra, message in [
        (("--num", "2", "--temperature", "1"), "num=2 needs prompts"),
        (("--json", "out.jsonl"), "json='out.jsonl' needs prompts"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run("--ckpt", runs / "topk", *extra)


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def send(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, text, seconds=120):
        """What came until `text` did."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def interrupt_until(self, text, times=60):
        """Ctrl-C, again where it was too early: CPython misses one just after it wrote a prompt."""
        for _ in range(times):
            self.send("\x03")
            with suppress(AssertionError):
                self.wait_for(text, seconds=2)
                return
        raise AssertionError(self.seen)

    def end(self):
        """Its exit status, by what it does itself; never later than the test."""
        try:
            return self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
            os.close(self.master)


@pytest.mark.slow
def test_a_conversation_on_a_terminal(runs):
    """Ctrl-C ends a text and not the program, Ctrl-D the program."""
    flags = ("--ckpt", str(runs / "long"), "--max_tokens", "2000", "--ignore_eos", "true")
    one = Terminal(sys.executable, "-m", "apps.topk.generate", *flags)
    one.wait_for("> ")
    one.send("The quick\n")
    one.wait_for("\nThe quick")
    one.send("\x03")
    assert len(one.wait_for("(stopped)")) < 20_000
    one.wait_for("> ")
    one.interrupt_until("> ")
    one.send("\x04")
    assert one.end() == 0
