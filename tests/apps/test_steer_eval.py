"""apps.topk.steer_eval on a small run: its numbers by hand, choices, files, going on, mistakes."""

import json
import logging
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from apps.topk import analyze, report, steer_eval
from apps.topk.checkpoint import newest_checkpoint, open_checkpoint
from apps.topk.generation import Generator
from apps.topk.neurons.corpus import token_pieces
from apps.topk.sampling import Sampling
from apps.topk.steering import handles as handles_module
from apps.topk.steering import methods, results
from apps.topk.steering.experiment import Experiment
from apps.topk.steering.handles import read_handles, scored
from apps.topk.steering.methods import Concept, directions, random_neuron
from apps.topk.steering.probes import probes_of, prompts_of_rows
from lingua_topk.analysis.recording import open_recording
from lingua_topk.analysis.words import words_of
from lingua_topk.errors import ConfigError, DataError
from lingua_topk.steering import Add, steer
from tests.apps.real_text import train_on, write_stories

N, DELTAS, PROMPTS = 2, (1.0, 4.0), 6
SMALL = [
    "--n", str(N), "--candidates", "6", "--deltas", "1,4", "--num_prompts", str(PROMPTS),
    "--prompt_tokens", "5", "--max_tokens", "9", "--seed", "3", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The dump_dirs of a TopK run, with its analysis, and of its twin."""
    root = write_stories(tmp_path_factory.mktemp("steer_eval"))
    for name, overrides in {"topk": [], "twin": ["model.topk=null"]}.items():
        train_on(root, root / name, "steps=40", *overrides)
    analyze.main([
        "--ckpt", str(root / "topk"), "--twin", str(root / "twin"), "--tokens", "3000",
        "--min_words", "3", "--contexts", "2", "--device", "cpu", "--quiet",
    ])  # fmt: skip
    logging.getLogger().handlers[:] = []
    return root


def small(arguments):
    """The flags of a small measurement, but for those that are given."""
    pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in arguments for word in pair]


def run(runs, *arguments, twin=True):
    given = ["--ckpt", str(runs / "topk"), *small(arguments), *map(str, arguments)]
    given += ["--twin", str(runs / "twin")] if twin else []
    steer_eval.main(given)


@pytest.fixture(scope="module")
def measured(runs):
    run(runs)
    return json.loads((runs / "topk" / "steering" / "steering.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models(runs):
    found = {}
    for name in ("topk", "twin"):
        found[name] = open_checkpoint(newest_checkpoint(runs / name)).model("cpu", torch.float32)
    return found


@pytest.fixture(scope="module")
def tokenizer(runs):
    return open_checkpoint(newest_checkpoint(runs / "topk")).tokenizer()


@pytest.fixture(scope="module")
def handles(runs):
    return read_handles(runs / "topk" / "neurons")


def test_every_method_concept_and_delta_has_a_row(measured):
    own = {one["name"] for one in measured["concepts"]}
    of_twin = {one["name"] for one in measured["twin_concepts"]}
    assert len(own) == len(of_twin) == N
    found = {(row["method"], row["concept"], row["delta"]) for row in measured["rows"]}
    names = (methods.NEURON, methods.RANDOM, methods.DIRECTION, methods.TWIN_DIRECTION)
    expected = {(name, one, delta) for name in names for one in own for delta in DELTAS}
    expected |= {(methods.TWIN_NEURON, one, delta) for one in of_twin for delta in DELTAS}
    assert found == expected and len(measured["rows"]) == len(expected)
    assert set(measured["methods"]) == {*names, methods.TWIN_NEURON}


def test_the_delta_is_chosen_by_other_prompts_and_words(measured):
    for one in measured["concepts"]:
        assert one["words"] and not set(one["words"]) & set(one["held_out_words"])
    groups = {}
    for row in measured["rows"]:
        groups.setdefault((row["method"], row["concept"]), []).append(row)
    for rows in groups.values():
        best = max(row["choosing"]["score"] for row in rows)
        chosen = [row for row in rows if row["chosen"]]
        assert [row["delta"] for row in chosen] == [
            min(row["delta"] for row in rows if row["choosing"]["score"] == best)
        ]


def test_the_numbers_are_those_by_hand(measured, runs, models, tokenizer):
    """Texts are generated, words counted and perplexity summed without the code under test."""
    row = next(one for one in measured["rows"] if one["method"] == methods.NEURON)
    (concept,) = (one for one in measured["concepts"] if one["name"] == row["concept"])
    pieces = token_pieces(tokenizer, models["topk"].tok_embeddings.num_embeddings)
    tokens = open_recording(runs / "topk" / "neurons" / "model" / "recording").tokens
    prompts = prompts_of_rows(np.asarray(tokens), pieces, PROMPTS // 2 + PROMPTS, 5, 3)
    sampling = Sampling(9, 0.8, seed=3, ignore_eos=True)
    generator = Generator(models["topk"], tokenizer)
    plain = generator.generate_tokens(prompts * 4, sampling)
    with steer(models["topk"], [Add(row["layer"], row["neuron"], row["absolute"])]):
        turned = generator.generate_tokens(prompts, sampling)
    size, first = len(prompts), PROMPTS // 2
    reported = [i for i in range(size) if i >= first]
    numbers = row["reported"]

    def rate(texts):
        hits = total = 0
        for prompt, text in texts:
            whole = tokenizer.decode(prompt + text.tokens)
            wanted = set(concept["held_out_words"])
            spans = [m.span() for m in re.finditer(r"[a-z']+", whole.lower())
                     if m.group() in wanted and m.end() < len(whole)]  # fmt: skip
            ends = [len(tokenizer.decode(prompt + text.tokens[:i])) for i in range(10)]
            for end in ends[1:]:
                hits += any(a < end and b >= end for a, b in spans)
                total += 1
        return hits, total

    hits, total = rate([(prompts[i], turned[i]) for i in reported])
    before, total_before = rate(
        [(prompts[i % size], plain[i]) for i in range(4 * size) if i % size >= first]
    )
    assert total == 9 * PROMPTS == numbers["tokens"]
    assert numbers["concept_rate"] == pytest.approx(hits / total)
    assert numbers["unsteered_rate"] == pytest.approx(before / total_before)
    assert numbers["lift"] == pytest.approx((hits + 0.5) / (before / 4 + 0.5))
    assert before > 0  # or there is nothing to see

    nats = 0.0
    for i in reported:
        ids = torch.tensor([prompts[i] + turned[i].tokens])
        with torch.no_grad():
            logits = models["twin"](ids)[0].log_softmax(-1)
        nats -= sum(logits[at - 1, ids[0, at]].item() for at in range(5, 14))
    assert numbers["perplexity"] == pytest.approx(math.exp(nats / total), rel=1e-4)
    bigrams = [list(zip(turned[i].tokens, turned[i].tokens[1:], strict=False)) for i in reported]
    assert numbers["distinct_2"] == pytest.approx(
        np.mean([len(set(some)) / len(some) for some in bigrams])
    )


def test_the_files_say_the_same(measured, runs):
    folder = runs / "topk" / "steering"
    names = {path.name for path in folder.iterdir()}
    assert names == {"steering.json", "steering.csv", "steering.md", "lift.svg"}
    lines = (folder / "steering.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(measured["rows"]) + 1
    table = (folder / "steering.md").read_text(encoding="utf-8")
    for one in measured["summary"]:
        assert f"| {one['method']} | {one['n']} | {one['lift']:.3g} [" in table
    assert (folder / "lift.svg").read_text(encoding="utf-8").count("<svg") == 1
    for one in measured["conclusion"]:
        assert one in table


def test_medians_and_aims(measured):
    for one in measured["summary"]:
        chosen = [
            row["reported"] for row in measured["rows"]
            if row["chosen"] and row["method"] == one["method"]
        ]  # fmt: skip
        assert one["lift"] == pytest.approx(np.median([row["lift"] for row in chosen]))
        low, high = one["lift_ci95"]
        assert low <= one["lift"] <= high
        reached = [row["lift"] >= 5 and row["perplexity_ratio"] <= 2 for row in chosen]
        assert one["n_reached"] == sum(reached)


def test_examples_are_texts_of_the_chosen_delta(measured):
    chosen = {(r["method"], r["concept"]): r["delta"] for r in measured["rows"] if r["chosen"]}
    assert measured["examples"]
    for one in measured["examples"]:
        assert chosen[one["method"], one["concept"]] == one["delta"]
        assert one["prompt"] and one["steered"] and one["unsteered"]


def test_the_report_takes_it_up(measured, runs, tmp_path, capsys):
    report.main(["--run", str(runs / "topk"), "--out", str(tmp_path / "r.html"), "--rows", "2"])
    assert 'id="view-steering"' in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_is_there_is_not_measured_again(measured, runs, monkeypatch, capsys):
    monkeypatch.setattr(Experiment, "run", lambda self: pytest.fail("measured again"))
    run(runs)
    assert measured["conclusion"][0] in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds steering with another settings"):
        run(runs, "--temperature", "0.5")


def test_stopped_it_goes_on(measured, runs, tmp_path, monkeypatch):
    own = Experiment._written
    calls = []

    def stopping(self, side, interventions, draws=1):
        calls.append(interventions)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return own(self, side, interventions, draws)

    monkeypatch.setattr(Experiment, "_written", stopping)
    out = tmp_path / "steering"
    with pytest.raises(KeyboardInterrupt):
        run(runs, "--out", out)
    assert not (out / "steering.json").exists()
    with open(out / "unfinished.jsonl", "a", encoding="utf-8") as file:
        file.write('[["neuron", "1:')  # a line that was cut short
    n_before = len(calls)
    run(runs, "--out", out)
    again = json.loads((out / "steering.json").read_text(encoding="utf-8"))
    assert again["rows"] == measured["rows"] and again["examples"] == measured["examples"]
    # Unsteered texts of both models, N concepts of the model, of directions in the twin and of the
    # twin, and two examples each: but for the one concept that was done.
    assert len(calls) - n_before == 2 + 3 * N + 2 * N - 1
    assert not (out / "unfinished.jsonl").exists()


def test_without_a_twin_the_model_itself_judges(runs, tmp_path):
    run(runs, "--out", tmp_path / "s", "--deltas", "1", "--n", "1", twin=False)
    content = json.loads((tmp_path / "s" / "steering.json").read_text(encoding="utf-8"))
    assert content["judge"] == "the model itself, unsteered"
    assert content["methods"] == [methods.NEURON, methods.RANDOM, methods.DIRECTION]
    assert "no twin was given" in content["conclusion"][0]


def test_named_neurons_and_own_prompts(runs, handles, tmp_path):
    names = [one.name for one in handles.all_of(1) if one.maximum > 0 and len(one.words) > 3][:2]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Anna\nIn the harbour\nNobody at\nThe basket\n", encoding="utf-8")
    run(runs, "--out", tmp_path / "s", "--neuron", ",".join(names), "--prompts", prompts,
        "--deltas", "2", twin=False)  # fmt: skip
    content = json.loads((tmp_path / "s" / "steering.json").read_text(encoding="utf-8"))
    assert {one["name"] for one in content["concepts"]} == set(names)
    assert all(row["reported"]["tokens"] == 2 * 9 for row in content["rows"])
    assert {one["prompt"] for one in content["examples"]} <= {
        "In the harbour", "Nobody at", "Anna", "The basket"
    }  # fmt: skip


def test_a_concept_of_the_twin_keeps_its_words_whatever_its_name(
    measured, runs, tmp_path, monkeypatch
):
    """The last concept of the model and the first of the twin may be called alike."""
    seen = []
    monkeypatch.setattr(
        Experiment, "_measure", lambda self, side, concept, some: seen.append((concept, some))
    )
    monkeypatch.setattr(results, "content_of", lambda one: pytest.fail("measured"))
    own = Experiment._work_of_the_twin

    def alike(self):
        work = list(own(self))
        last = [one for _, one, method in work if method.name == methods.TWIN_DIRECTION][-1]
        for side, one, method in work:
            is_own = method.name == methods.TWIN_NEURON
            handle = replace(one.handle, layer=last.handle.layer, neuron=last.handle.neuron)
            yield side, Concept(handle, one.held_out) if is_own else one, method

    monkeypatch.setattr(Experiment, "_work_of_the_twin", alike)
    with pytest.raises(pytest.fail.Exception, match="measured"):
        run(runs, "--out", tmp_path / "s")
    for concept, some in seen:
        is_twins = {method.name == methods.TWIN_NEURON for method in some}
        assert len(is_twins) == 1, concept.name


# Parts -------------------------------------------------------------------------------------


def test_the_output_score_by_its_formula(handles, models, tokenizer, runs):
    model = models["topk"]
    probes = probes_of(runs / "topk" / "neurons")[:5]
    some = handles.shortlist(4)
    found = {one.name: one for one in scored(some, model, tokenizer, probes)}

    def log_p():
        with torch.no_grad():
            return model(probes)[:, -1].double().log_softmax(-1)

    before = log_p()
    for one in some:
        spelled = [tokenizer.encode(f" {word}", False, False) for word in one.words]
        ids = [ids[0] for ids in spelled if len(ids) == 1]
        assert ids  # words of one token
        best, strength = 0.0, 0.0
        for multiple in handles_module.STRENGTHS:
            with steer(model, [Add(one.layer, one.neuron, multiple * one.maximum)]):
                after = log_p()
            masses = [
                sum(one[i, ids].exp().sum().item() for i in range(5)) for one in (after, before)
            ]
            gain = math.log(masses[0] / masses[1])
            costs = [
                -(after[i].exp() * before[i]).sum() + (before[i].exp() * before[i]).sum()
                for i in range(5)
            ]
            if sum(costs) / 5 > math.log(2):
                break
            if gain > best:
                best, strength = gain, multiple
        assert found[one.name].output_score == pytest.approx(best, abs=1e-4)
        assert found[one.name].strength == strength
    ordered = [one.output_score for one in found.values()]
    assert ordered == sorted(ordered, reverse=True)


def test_a_random_neuron_fires_as_often_on_other_words(handles):
    for one in handles.shortlist(5):
        other = random_neuron(handles, one, seed=1)
        assert other.layer == one.layer and other.neuron != one.neuron
        assert not set(other.words[:5]) & set(one.words[:5])
        gap = abs(math.log(other.firing_rate) - math.log(one.firing_rate))
        gaps = sorted(
            abs(math.log(x.firing_rate) - math.log(one.firing_rate))
            for x in handles.all_of(one.layer)
            if x.maximum > 0
            and x.neuron != one.neuron
            and not set(x.words[:5]) & set(one.words[:5])
        )
        assert gap <= gaps[min(9, len(gaps) - 1)]
        assert random_neuron(handles, one, seed=1).name == other.name


@pytest.mark.parametrize("dense", [False, True])
def test_a_direction_is_a_difference_of_means(runs, models, handles, tokenizer, dense):
    model = models["twin" if dense else "topk"]
    tokens = np.asarray(open_recording(runs / "topk" / "neurons" / "model" / "recording").tokens)[
        :7
    ]
    pieces = token_pieces(tokenizer, model.tok_embeddings.num_embeddings)
    words = words_of(tokens, pieces)
    (one,) = handles.shortlist(1)
    found = directions(model, [Concept(one, ())], tokens, words, 3, dense)[one.name]
    seen = []
    hook = model.layers[one.layer].register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model(torch.from_numpy(tokens).long())
    hook.remove()
    inside = [w >= 0 and words.words[w] in one.words for w in words.index.tolist()]
    y = seen[0].reshape(-1, seen[0].shape[-1]).double()
    at = torch.tensor(inside)
    assert 0 < sum(inside) < len(inside)
    torch.testing.assert_close(found.double(), y[at].mean(0) - y[~at].mean(0), rtol=0, atol=1e-5)


def test_prompts_are_whole_words(runs, tokenizer):
    tokens = np.asarray(open_recording(runs / "topk" / "neurons" / "model" / "recording").tokens)
    pieces = token_pieces(tokenizer, int(tokens.max()) + 1)
    found = prompts_of_rows(tokens, pieces, 20, 6, seed=2)
    rows = [" ".join(map(str, row)) + " " for row in tokens.tolist()]
    assert len({tuple(one) for one in found}) > 15
    for one in found:
        assert len(one) == 6 and pieces[one[0]].startswith(b" ")
        where = " ".join(map(str, one)) + " "
        followers = [row.split(where, 1)[1].split(" ")[0] for row in rows if where in row]
        assert any(pieces[int(token)].startswith(b" ") for token in followers if token)
    assert prompts_of_rows(tokens, pieces, 20, 6, seed=2) == found
    assert prompts_of_rows(tokens, pieces, 20, 6, seed=3) != found
    with pytest.raises(DataError, match="are wanted"):
        prompts_of_rows(tokens[:1, :8], pieces, 20, 6, seed=2)


# Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--deltas", "1,x"], "deltas='x' is not a number"),
        (["--deltas", "nan"], "deltas='nan' is not a number"),
        (["--deltas", "-1"], "deltas='-1': -1 is not allowed"),
        (["--deltas", ","], "deltas=',' has no number"),
        (["--neuron", "9:1"], "layer 9 is not one that was analysed"),
        (["--neuron", "1:999"], "the nearest is 1:31"),
        (["--neuron", "one"], "is no neuron"),
        (["--n", "0"], "n=0 is too small"),
        (["--num_prompts", "1"], "num_prompts=1"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--seed", "-1"], "seed=-1"),
    ],
)
def test_mistakes(runs, tmp_path, arguments, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(runs, "--out", tmp_path / "s", *arguments, twin=False)
    assert not (tmp_path / "s" / "steering.json").exists()


def test_mistakes_of_folders(runs, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no steering"):
        run(runs, "--out", tmp_path / "other")
    with pytest.raises(ConfigError, match="is a vanilla model"):
        steer_eval.main(["--ckpt", str(runs / "twin")])
    with pytest.raises(ConfigError, match="has TopK: give the vanilla twin"):
        steer_eval.main(["--ckpt", str(runs / "topk"), "--twin", str(runs / "topk")])
    with pytest.raises(DataError, match="holds no finished analysis"):
        run(runs, "--analysis", tmp_path / "other", "--out", tmp_path / "s")
