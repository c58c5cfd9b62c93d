"""apps.topk.steer on a small run: texts as by hand, choices, files, conversations, mistakes."""

import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apps.topk import analyze, cli, generate, result_lines, steer, terminal
from apps.topk.checkpoint import newest_checkpoint, open_checkpoint
from apps.topk.generation import Generator
from apps.topk.sampling import Sampling
from apps.topk.steering import bench as bench_module
from apps.topk.steering import choosing
from apps.topk.steering.arguments import numbers
from apps.topk.steering.bench import Bench
from apps.topk.steering.handles import read_handles
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from lingua_topk.steering import Ablate, Add, Scale
from lingua_topk.steering import steer as steered
from tests.apps.made_up_analysis import write_analysis
from tests.apps.real_text import train_on, write_stories

ROOT = Path(__file__).resolve().parents[2]
LAYERS, WIDTH = (0, 1), 32  # with TopK
PROMPT = "Anna carried the"
DRAWN = {"max_tokens": 8, "temperature": 0.7, "seed": 3}
SHORT = ["--max_tokens", "8", "--seed", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The dump_dirs of a TopK run and its twin, and `neurons`, the analysis of both."""
    root = write_stories(tmp_path_factory.mktemp("steer"))
    for name, overrides in {"topk": [], "twin": ["model.topk=null"]}.items():
        train_on(root, root / name, "steps=30", *overrides)
    analyze.main([
        "--ckpt", str(root / "topk"), "--out", str(root / "neurons"), "--tokens", "3000",
        "--min_words", "3", "--contexts", "2", "--device", "cpu", "--quiet",
    ])  # fmt: skip
    logging.getLogger().handlers[:] = []
    return root


@pytest.fixture(scope="module")
def handles(runs):
    return read_handles(runs / "neurons")


@pytest.fixture(scope="module")
def handle(handles):
    """A neuron that fires, with words."""
    return next(one for one in handles.all_of(1) if one.maximum > 0 and one.words)


@pytest.fixture(scope="module")
def bench(runs):
    return opened(runs)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def opened(runs, analysis=None, ckpt=None):
    checkpoint = open_checkpoint(newest_checkpoint(ckpt or runs / "topk"))
    return Bench(
        checkpoint, analysis=str(analysis or runs / "neurons"), twin=None, dtype="fp32",
        device=torch.device("cpu"), batch_tokens=2**14,
    )  # fmt: skip


def run(runs, *arguments, analysis=True):
    given = ["--ckpt", runs / "topk", *SHORT, *arguments]
    given += ["--analysis", runs / "neurons"] if analysis else []
    steer.main([str(one) for one in given])


def results(runs, path, *arguments, **more):
    run(runs, "--json", path, *arguments, **more)
    return read(path)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_hand(runs, prompts, interventions, **sampling):
    """Texts of a plain Generator within steer."""
    checkpoint = open_checkpoint(newest_checkpoint(runs / "topk"))
    model = checkpoint.model("cpu", torch.float32)
    with steered(model, interventions):
        found = Generator(model, checkpoint.tokenizer()).generate(
            prompts, Sampling(**{**DRAWN, **sampling})
        )
    return [one.tokens for one in found]


def piped(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode()), "utf-8"))


# Texts.


def test_unsteered_texts_are_those_of_generate(runs, tmp_path):
    texts = ["--prompt", PROMPT, "--prompt", "In the", "--num", "2"]
    found = results(runs, tmp_path / "a", "--neuron", "1:3", "--delta", "50", *texts)
    generate.main([
        "--ckpt", str(runs / "topk"), *SHORT, "--temperature", "0.7", *texts, "--json",
        str(tmp_path / "b"),
    ])  # fmt: skip
    unsteered = [line for line in found if line["mode"] is None]
    names = ("index", "completion", "prompt", "text", "tokens", "reason")
    assert [{name: line[name] for name in names} for line in unsteered] == read(tmp_path / "b")
    assert len(found) == 8


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        (["--delta", "20,-9.5"], lambda n: [[Add(1, n, 20.0)], [Add(1, n, -9.5)]]),
        (["--mode", "ablate"], lambda n: [[Ablate(1, n)]]),
        (["--mode", "scale", "--delta", "6"], lambda n: [[Scale(1, n, 6.0)]]),
        (["--suppress", "--delta", "9"], lambda n: [[Ablate(1, n)], [Add(1, n, -9.0)]]),
        (
            ["--delta", "30", "--where", "generated", "--before_selection"],
            lambda n: [[Add(1, n, 30.0, where="generated", before_selection=True)]],
        ),
    ],
)
def test_steered_texts_are_those_of_the_context(runs, handle, tmp_path, flags, made):
    found = results(
        runs, tmp_path / "a", "--neuron", handle.name, *flags, "--prompt", PROMPT, "--prompt", "The"
    )
    expected = [by_hand(runs, [PROMPT, "The"], one) for one in made(handle.neuron)]
    for index in (0, 1):
        lines = [one for one in found if one["index"] == index]
        assert [one["tokens"] for one in lines[1:]] == [one[index] for one in expected]
    assert [one["mode"] is None for one in found] == [
        i % (len(expected) + 1) == 0 for i in range(len(found))
    ]


def test_steering_is_seen_in_the_texts(runs, handle, tmp_path):
    lines = results(
        runs, tmp_path / "a", "--neuron", handle.name, "--delta", "0,60", "--prompt", PROMPT
    )
    assert lines[0]["tokens"] == lines[1]["tokens"] != lines[2]["tokens"]


def test_units_are_the_neurons_own(runs, handles, tmp_path):
    two = [one for one in handles.all_of(0) if one.maximum > 0][:2]
    names = ",".join(one.name for one in two)
    for unit in ("mean", "maximum"):
        line = results(
            runs, tmp_path / unit, "--neuron", names, "--delta", "2", "--unit", unit, "--prompt=A"
        )[1]
        assert line["absolute"] == [2 * getattr(one, unit) for one in two]
        assert (line["delta"], line["unit"], line["neurons"]) == (2.0, unit, names.split(","))
    by_default = results(runs, tmp_path / "c", "--neuron", names, "--prompt=A")
    assert [line["delta"] for line in by_default] == [None, 1.0, 2.0, 4.0]
    assert by_default[1]["absolute"] == [one.maximum for one in two]


def test_the_perplexity_under_the_twin(runs, handle, tmp_path):
    lines = results(
        runs, tmp_path / "a", "--neuron", handle.name, "--delta", "30", "--prompt", PROMPT,
        "--twin", runs / "twin",
    )  # fmt: skip
    checkpoint = open_checkpoint(newest_checkpoint(runs / "twin"))
    model, tokenizer = checkpoint.model("cpu", torch.float32), checkpoint.tokenizer()
    for line in lines:
        context = tokenizer.encode(PROMPT, True, False)
        logits = model(torch.tensor([context + line["tokens"]]))[0].double().log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(line["tokens"]) - 1)
        nats = [-logits[i, t].item() for i, t in zip(places, line["tokens"], strict=True)]
        assert line["twin_perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)


# The terminal.


def test_texts_are_shown_side_by_side_below_what_is_turned(runs, handle, capsys):
    run(runs, "--neuron", handle.name, "--delta", "30", "--prompt", PROMPT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"neuron {handle.name}"
    assert lines[1].startswith(f"  words: {handle.words[0]}")
    multiple = f"{30 / handle.maximum:.3g}"
    assert f"  +30 ({multiple} x its maximum); at all positions, after the selection" in lines
    head = next(line for line in lines if "unsteered" in line)
    assert f"+30 ({multiple} x maximum)" in head
    assert sum(line.count(PROMPT) for line in lines) == 2
    assert any("of words (unsteered " in line for line in lines)


def test_suppressed_texts_are_shown_stacked_where_it_is_narrow(runs, handle, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    run(runs, "--neuron", handle.name, "--suppress", "--delta", "9", "--prompt", PROMPT)
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--- ")]
    assert [head.partition(":")[0].partition(" (")[0] for head in heads] == [
        "--- unsteered", "--- ablated", "--- -9",
    ]  # fmt: skip


def test_words_of_the_concept_are_marked(runs, handle, capsys, monkeypatch):
    word = handle.words[0]
    original = Generator.generate

    def with_word(self, prompts, *arguments, **more):
        found = original(self, prompts, *arguments, **more)
        for one in found:
            one.text = f" {word.upper()} [b]xyzzy[/b]"
        return found

    monkeypatch.setattr(Generator, "generate", with_word)
    run(runs, "--neuron", handle.name, "--delta", "3", "--prompt", PROMPT)
    out = capsys.readouterr().out
    assert out.count(f"{PROMPT} *{word.upper()}* [b]xyzzy[/b]") == 2
    # The word, and of `b`, `xyzzy`, `b` none.
    assert "25% of words (unsteered 25%)" in out


def test_without_an_analysis_absolute_deltas_work_and_it_is_said_what_is_missing(runs, capsys):
    run(runs, "--neuron", "1:3", "--delta", "9", "--prompt", PROMPT, analysis=False)
    out = capsys.readouterr().out
    assert "+9 " in out and "x maximum" not in out and "*" not in out
    assert "No words are known" in out and "python -m apps.topk.analyze --ckpt" in out


def test_the_analysis_is_found_in_the_run(runs, handle, tmp_path, capsys):
    (tmp_path / "checkpoints").symlink_to(runs / "topk" / "checkpoints")
    (tmp_path / "neurons").symlink_to(runs / "neurons")
    given = ["--ckpt", str(tmp_path), *SHORT, "--neuron", handle.name, "--prompt", PROMPT]
    steer.main(given)
    out = capsys.readouterr().out
    assert f"words: {handle.words[0]}" in out and "(1 x maximum)" in out and "note:" not in out


def test_an_analysis_of_another_step_is_noted(runs, handle, tmp_path, capsys):
    shutil.copytree(runs / "neurons", tmp_path / "neurons")
    path = tmp_path / "neurons" / "analysis.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 7}), encoding="utf-8")
    run(
        runs, "--neuron", handle.name, "--prompt=A", "--analysis", tmp_path / "neurons",
        analysis=False,
    )  # fmt: skip
    assert "note: the analysis is of step 7, the checkpoint of step 30" in capsys.readouterr().out


def test_a_layer_that_was_not_analysed_has_no_words(runs, tmp_path, capsys):
    shutil.copytree(runs / "neurons", tmp_path / "neurons")
    (tmp_path / "neurons" / "model" / "layers" / "01.safetensors").unlink()
    there = ("--analysis", tmp_path / "neurons", "--prompt=A", "--neuron", "1:3")
    run(runs, *there, "--delta", "4", analysis=False)
    assert "No words are known" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="unit='maximum' needs an analysis of neuron 1:3"):
        run(runs, *there, analysis=False)


# Choices.


def test_of_those_that_fire_on_a_word_the_best_output_scores_are_taken(bench, handle):
    word = handle.words[0]
    found = choosing.candidates_of_word(bench, word)
    assert found and all(word in one.words and one.layer in LAYERS for one in found)
    scores = [one.output_score for one in found]
    assert None not in scores and scores == sorted(scores, reverse=True)
    choice = choosing.of_word(bench, word, 1)
    assert choice.neurons == (found[0],)
    assert choice.why.startswith(f"neuron {found[0].name}: ")
    assert f"{found[0].output_score:.2f} nats" in choice.why
    with pytest.raises(ConfigError, match=f"n={len(found) + 1} is too many"):
        choosing.of_word(bench, word, len(found) + 1)


def test_several_neurons_of_a_word_are_turned_together(runs, bench, handles, tmp_path):
    words = {word for one in handles.all_of(0) for word in one.words}
    word = max(sorted(words), key=lambda one: len(handles.of_word(one)))
    found = choosing.candidates_of_word(bench, word)[:2]
    lines = results(
        runs, tmp_path / "a", "--concept", word, "--n", "2", "--delta", "15", "--prompt", PROMPT
    )
    assert lines[1]["neurons"] == [one.name for one in found]
    assert lines[1]["absolute"] == [15.0, 15.0]
    together = [Add(one.layer, one.neuron, 15.0) for one in found]
    assert by_hand(runs, [PROMPT], together) == [lines[1]["tokens"]]


def test_the_tool_proposes_a_neuron_of_its_own_and_says_why(runs, bench, handles, capsys):
    best = choosing.candidates_of_all(bench)[0]
    assert best.name in [one.name for one in handles.shortlist(choosing.CANDIDATES)]
    run(runs, "--delta", "2", "--prompt", PROMPT)
    out = capsys.readouterr().out
    assert out.startswith(f"neuron {best.name}: of the ") and "lowest semantic entropy" in out
    assert f"output score {best.output_score:.2f} nats" in out


def test_lists(runs, bench, handle, capsys, tmp_path):
    word = handle.words[0]
    run(runs, "--list", "--concept", word)
    names = [one.name for one in choosing.candidates_of_word(bench, word)]
    shown = [
        line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    assert [name for name in shown if ":" in name] == names[: steer.LISTED]
    found = results(runs, tmp_path / "a", "--list", "--n", "3")
    assert [line["name"] for line in found] == [
        one.name for one in choosing.candidates_of_all(bench)[:3]
    ]
    assert found[0]["words"] and found[0]["output_score"] >= found[1]["output_score"]
    assert "3 neurons" in capsys.readouterr().out


# Files.


def test_results_as_json_with_their_origin(runs, handle, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    lines = results(
        runs, path, "--neuron", handle.name, "--delta", "8", "--prompt", PROMPT, "--num", "2"
    )
    assert capsys.readouterr().out == f"written: {path} (4 texts)\n"
    assert [(one["completion"], one["mode"], one["delta"]) for one in lines] == [
        (0, None, None), (0, "add", 8.0), (1, None, None), (1, "add", 8.0),
    ]  # fmt: skip
    for one in lines:
        assert one["prompt"] == PROMPT and one["twin_perplexity"] is None
        assert 0 <= one["concept_words"] <= one["words"]
    origin = json.loads((tmp_path / "a.jsonl.provenance.json").read_text(encoding="utf-8"))
    assert origin["step"] == 30 and origin["sampling"]["seed"] == 3
    assert origin["neurons"][0]["name"] == handle.name
    assert origin["neurons"][0]["words"] == list(handle.words)
    assert origin["turning"]["deltas"] == [8.0] and origin["analysis"].endswith("neurons")
    assert len(list(tmp_path.iterdir())) == 2


def test_without_an_analysis_unknown_numbers_are_null(runs, tmp_path):
    given = ("--neuron", "1:3", "--delta", "8", "--prompt", PROMPT)
    lines = results(runs, tmp_path / "a", *given, analysis=False)
    assert lines[1]["concept_words"] is None and lines[1]["words"] > 0
    origin = json.loads((tmp_path / "a.provenance.json").read_text(encoding="utf-8"))
    assert origin["neurons"][0]["maximum"] is None and origin["analysis"] is None


def test_nothing_is_left_of_results_that_cannot_be_written(runs, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result_lines, "write_text", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        run(runs, "--neuron", "1:3", "--delta", "1", "--prompt=A", "--json", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_left_alone(runs, tmp_path):
    for name in ("out", "out.provenance.json"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
        with pytest.raises(ConfigError, match="is there already"):
            run(runs, "--neuron", "1:3", "--prompt=A", "--json", tmp_path / "out")
        assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["mine"]
        (tmp_path / name).unlink()


def test_prompts_from_a_file_and_a_pipe(runs, tmp_path, monkeypatch):
    (tmp_path / "some.txt").write_text("In the\n\nThe\n", encoding="utf-8")
    given = ("--neuron", "1:3", "--delta", "1")
    lines = results(runs, tmp_path / "a", *given, "--prompts", tmp_path / "some.txt")
    assert [one["prompt"] for one in lines] == ["In the"] * 2 + ["The"] * 2
    piped(monkeypatch, "Anna\n")
    assert [one["prompt"] for one in results(runs, tmp_path / "b", *given)] == ["Anna"] * 2


# Conversations.


def converse(runs, monkeypatch, capsys, lines, *arguments):
    """What is said after each line, first what is said before any."""
    piped(monkeypatch, "".join(line + "\n" for line in lines))
    run(runs, "--interactive", *arguments)
    return capsys.readouterr().out.split("\n> ")


def texts_of(runs, interventions, prompt=PROMPT, **sampling):
    tokenizer = open_checkpoint(newest_checkpoint(runs / "topk")).tokenizer()
    (tokens,) = by_hand(runs, [prompt], interventions, **sampling)
    text = tokenizer.decode([*tokenizer.encode(prompt, False, False), *tokens])
    return terminal.shown(text)


def flat(said):
    """What is said without marks and lines, for comparing texts."""
    return " ".join(said.replace("│", " ").replace("*", "").split())


def test_a_conversation(runs, handle, monkeypatch, capsys):
    layer, neuron = handle.layer, handle.neuron
    said = converse(
        runs, monkeypatch, capsys,
        ["40", "In the river", "s 11", "n 0:5", "p 7 men", "w generated", "m ablate", "", "99"],
        "--neuron", handle.name, "--delta", "20", "--prompt", PROMPT,
    )  # fmt: skip
    assert "unit: absolute" in said[0] and f"neuron {handle.name}" in said[0]
    assert flat(texts_of(runs, [])) in flat(said[0])
    assert flat(texts_of(runs, [Add(layer, neuron, 20.0)])) in flat(said[0])
    assert said[1].startswith("40\n") and "words:" not in said[1]
    assert flat(texts_of(runs, [Add(layer, neuron, 40.0)])) in flat(said[1])
    forty = [Add(layer, neuron, 40.0)]
    assert flat(texts_of(runs, forty, "In the river")) in flat(said[2])
    assert flat(texts_of(runs, forty, "In the river", seed=11)) in flat(said[3])
    assert said[4].startswith("n 0:5\nneuron 0:5\n")
    five = [Add(0, 5, 40.0)]
    assert flat(texts_of(runs, five, "In the river", seed=11)) in flat(said[4])
    assert flat(texts_of(runs, five, "7 men", seed=11)) in flat(said[5])
    assert "at generated positions" in said[6]
    later = [Add(0, 5, 40.0, where="generated")]
    assert flat(texts_of(runs, later, "7 men", seed=11)) in flat(said[6])
    assert "ablated" in said[7]
    assert flat(said[8]) == "" and len(said) == 9  # the empty line ended it: 99 was not read


def test_concepts_and_units_in_a_conversation(runs, bench, handle, monkeypatch, capsys):
    word = handle.words[0]
    best = choosing.of_word(bench, word, 1).neurons[0]
    said = converse(
        runs, monkeypatch, capsys, [f"c {word}", "u maximum", "0.5,2", "?"],
        "--neuron", "0:5", "--delta", "3",
    )  # fmt: skip
    assert f"{steer.FIRST_PROMPT}" in said[0]
    assert f"neuron {best.name}: " in said[1] and "+3 " in said[1]
    assert f"+{3 * best.maximum:.4g} (3 x maximum)" in said[2]
    assert f"+{0.5 * best.maximum:.4g} (0.5 x maximum)" in said[3]
    assert f"+{2 * best.maximum:.4g} (2 x maximum)" in said[3]
    assert "c WORD" in said[4] and "Ctrl-C" in said[4]


def test_mistakes_in_a_conversation_change_nothing(runs, handle, monkeypatch, capsys):
    mistakes = {
        "3,nan": "delta='nan' is not a number",
        "inf": "delta='inf' is not a number",
        "n 2:1": "layer=2 is not a TopK layer: those are 0, 1; the nearest is 1",
        "n one": "neuron='one' is no neuron",
        "c wrokxq": "concept='wrokxq' is not among the words",
        "s x": "seed='x' is not a whole number",
        "s 99999999999999999999": "seed=99999999999999999999 is not allowed",
        "u men": "unit='men' is not known: did you mean mean?",
        "w prompts": "where='prompts' is not known: did you mean prompt?",
        "m sett": "mode='sett' is not known: did you mean set?",
        "p": "p needs a value",
        "x" * 500: "prompts[0] has ",
    }
    said = converse(
        runs, monkeypatch, capsys, [*mistakes, "20"], "--neuron", handle.name, "--delta", "3",
        "--prompt", PROMPT,
    )  # fmt: skip
    for (line, message), answer in zip(mistakes.items(), said[1:], strict=False):
        assert message in answer and answer.startswith(f"{line}\n") and answer.count("\n") == 1
    text = flat(texts_of(runs, [Add(handle.layer, handle.neuron, 20.0)]))
    assert text in flat(said[len(mistakes) + 1])


def test_suppressing_in_a_conversation(runs, handle, monkeypatch, capsys):
    said = converse(
        runs, monkeypatch, capsys, ["-4", "m set", "5"], "--neuron", handle.name, "--suppress",
        "--delta", "3", "--prompt", PROMPT,
    )  # fmt: skip
    assert "delta=-4 with --suppress" in said[1] and "mode='set'" in said[2]
    assert "ablated" in said[3] and "-5" in said[3]


def test_a_number_is_refused_where_neurons_are_ablated(runs, monkeypatch, capsys):
    said = converse(
        runs, monkeypatch, capsys, ["3", "m add"], "--neuron", "1:3", "--mode", "ablate"
    )
    assert "mode ablate takes none" in said[1] and "+1 " in said[2]


def test_ctrl_c_stops_a_text_and_not_the_program(runs, monkeypatch, capsys):
    original, calls = Bench.write, []

    def write(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Bench, "write", write)
    said = converse(
        runs, monkeypatch, capsys, ["20", "s 4"], "--neuron", "1:3", "--delta", "3",
        "--prompt", PROMPT,
    )  # fmt: skip
    assert "(stopped)" in said[1]
    assert "+20" in said[2]  # what was entered holds


def test_on_a_terminal_without_a_prompt_it_converses(runs, monkeypatch, capsys):
    piped(monkeypatch, "\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "")
    run(runs, "--neuron", "1:3", "--delta", "2")
    assert "Enter a number" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="json='out' needs prompts"):
        run(runs, "--neuron", "1:3", "--delta", "2", "--json", "out")


def test_unsteered_texts_are_written_once_for_several_deltas(bench, monkeypatch):
    calls = []
    original = Generator.generate

    def counted(self, prompts, *arguments, **more):
        calls.append(list(prompts))
        return original(self, prompts, *arguments, **more)

    monkeypatch.setattr(bench_module.Generator, "generate", counted)
    first = bench.write(["The cat"], Sampling(max_tokens=2), [])
    again = bench.write(["The cat"], Sampling(max_tokens=2), [])
    assert len(calls) == 1 and first[0].texts == again[0].texts
    bench.write(["The cat"], Sampling(max_tokens=2, seed=1), [])
    assert len(calls) == 2


# Mistakes.

MISTAKES = [
    (["--neurn", "1:3"], "--neurn is no known flag: did you mean neuron?"),
    (["--neuron", "1:999"], "neuron=999 is not there: layer 1 has 0 to 31; the nearest is 31"),
    (["--neuron", "2:3"], "layer=2 is not a TopK layer: those are 0, 1; the nearest is 1"),
    (["--neuron", "9:3"], "layer=9 is not there: the model has 0 to 2"),
    (["--neuron", "three"], "neuron='three' is no neuron: give LAYER:NEURON, such as 3:417"),
    (["--neuron", ","], "neuron=',' names none"),
    (["--neuron", "1:3", "--concept", "a"], "both name what is turned"),
    (["--neuron", "1:3", "--n", "2"], "n=2 is of --concept"),
    (["--n", "-1"], "n=-1 is not allowed"),
    (["--n", "999"], "n=999 is too many"),
    (["--neuron", "1:3", "--delta", "x"], "delta='x' is not a number: give finite ones"),
    (["--neuron", "1:3", "--delta", "4,nan"], "delta='nan' is not a number"),
    (["--neuron", "1:3", "--delta", "-inf"], "delta='-inf' is not a number"),
    (["--neuron", "1:3", "--delta", ","], "delta=',' has no number"),
    (["--neuron", "1:3", "--delta", "1e39"], "delta=1e.39: the steered model gives no finite"),
    (["--neuron", "1:3", "--unit", "maximal"], "unit='maximal' is not known: did you mean maximum"),
    (["--neuron", "1:3", "--unit", "absolute"], "unit='absolute' needs numbers: give --delta"),
    (["--mode", "adds"], "mode='adds' is not known: did you mean add?"),
    (["--where", "propmt"], "where='propmt' is not known: did you mean prompt?"),
    (["--mode", "ablate", "--delta", "3"], "mode='ablate' sets neurons to 0: leave --delta"),
    (["--mode", "ablate", "--unit", "mean"], "mode='ablate' sets neurons to 0: leave --delta"),
    (["--mode", "scale", "--unit", "mean"], "unit='mean' with mode='scale'"),
    (["--mode", "set", "--suppress"], "mode='set' with --suppress"),
    (["--suppress", "--delta", "-3"], "delta=-3 with --suppress, which subtracts it"),
    (["--list"], "--list shows neurons and writes no text"),
    (["--interactive", "--json", "out"], "json='out' with --interactive"),
    (["--interactive", "--prompt", "B"], "--interactive begins with one prompt"),
    (["--num", "0"], "num=0 is not allowed"),
    (["--num", "2", "--temperature", "0"], "would give the same text 2 times"),
    (["--temperature", "-1"], "temperature=-1.0 is not allowed"),
    (["--dtype", "int8"], "dtype='int8' is not known"),
    (["--batch_tokens", "0"], "batch_tokens=0 is not allowed"),
    (["--device", "gpu"], "--device is given twice"),
    (["--json", "/nowhere/out"], "/nowhere is no folder"),
    (["--prompts", "nowhere.txt"], "prompts=nowhere.txt cannot be read"),
    (["--neuron", "1:3", "--prompt", "x" * 500], r"prompts\[1\] has "),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(runs, arguments, message, capsys):
    with pytest.raises(ConfigError, match=message) as error:
        run(runs, "--prompt", "The", *arguments)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_a_word_that_no_neuron_fires_on_is_answered_with_the_nearest(runs, handle):
    word = max(handle.words, key=len)
    with pytest.raises(ConfigError, match=f"near it: .*{word}"):
        run(runs, "--concept", f"{word}q", "--prompt", "The")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--concept", "letter"],
        ["--list"],
        [],
        ["--neuron", "1:3"],
        ["--neuron", "1:3", "--delta", "2", "--unit", "mean"],
        ["--neuron", "1:3", "--delta", "2", "--unit", "maximum"],
    ],
)
def test_what_needs_an_analysis_says_how_to_make_one(runs, arguments):
    prompt = [] if "--list" in arguments else ["--prompt", "The"]
    with pytest.raises(ConfigError, match=r"needs an analysis.*python -m apps\.topk\.analyze"):
        run(runs, *prompt, *arguments, analysis=False)


def test_analyses_that_cannot_be_used(runs, tmp_path):
    given = ("--neuron", "1:3", "--delta", "2", "--prompt", "The")
    with pytest.raises(DataError, match="holds no finished analysis"):
        run(runs, *given, "--analysis", tmp_path, analysis=False)
    write_analysis(tmp_path / "other", n=40, twin=False)
    shutil.copy(runs / "neurons" / "analysis.json", tmp_path / "other")
    with pytest.raises(DataError, match="layer 0 has 40 neurons, and the checkpoint 32"):
        run(runs, *given, "--analysis", tmp_path / "other", analysis=False)


def test_models_without_topk_and_twins_with_it(runs, tmp_path):
    with pytest.raises(ConfigError, match="is a vanilla model, without TopK"):
        steer.main(["--ckpt", str(runs / "twin"), "--neuron", "1:3", "--prompt", "The"])
    with pytest.raises(CheckpointError, match="has TopK itself"):
        run(runs, "--neuron", "1:3", "--delta", "2", "--prompt=A", "--twin", runs / "topk")
    with pytest.raises(CheckpointError):
        steer.main(["--ckpt", str(tmp_path), "--neuron", "1:3", "--prompt", "The"])


def test_numbers_are_read_as_they_are_and_once():
    assert numbers(" 4, -8,1e1,4.0") == (4.0, -8.0, 10.0)


def test_a_mistake_ends_with_status_2_and_one_line(runs, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: run(runs, "--neuron", "7:1", "--prompt", "The"))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert [line.startswith("error: layer=7 is not there") for line in said] == [True]


def test_help_and_what_is_loaded_for_it(capsys):
    steer.main(["--prompt", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m apps.topk.steer --ckpt") and "at most the delta" in out
    program = "import sys, apps.topk.steer; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    unwanted = {
        "torch._inductor",
        "torch.distributed.fsdp",
        "transformers",
        "lm_eval",
        "matplotlib",
    }
    assert not unwanted.intersection(done.stdout.split())
