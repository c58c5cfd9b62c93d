"""How steered texts are shown: words found and counted, highlighted, in columns or stacked."""

import io

import pytest
from rich.console import Console

from apps.topk.generation import Generation
from apps.topk.steering import showing
from apps.topk.steering.bench import Written
from apps.topk.steering.choosing import Choice
from apps.topk.steering.concept_words import count, spans_of, words_in
from apps.topk.steering.handles import Handle
from apps.topk.steering.turning import ABLATE, ADD, CLAMP, SCALE, SET, Turning, unknown, variants
from lingua_topk.errors import ConfigError
from lingua_topk.steering import Ablate, Add, Clamp, Scale, Set

NAN = float("nan")
MODAL = Handle(1, 21, ("will", "can't"), 1.5, 0.1, mean=5.0, maximum=20.0)
OTHER = Handle(0, 3, ("work",), NAN, 0.2, mean=2.0, maximum=8.0, output_score=0.5)
DEAD = Handle(1, 7, (), NAN, 0.0, mean=0.0, maximum=0.0)


def turning(mode=ADD, deltas=(1.0,), unit="absolute", **more):
    fields = {"where": "all", "before_selection": False, "suppress": False, **more}
    return Turning(mode, deltas, unit, **fields)


def terminal(width=80, colours=False, **more):
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colours,
        highlight=False,
        _environ={},
        **more,
    )


def plain(out):
    return out.file.getvalue()


# Words.


def test_words_are_those_of_the_analysis_with_their_places():
    text = "It will\u2019nt, We'll naïve_Will 3will"
    found = list(words_in(text))
    assert [word for word, _, _ in found] == ["it", "will'nt", "we'll", "naïve", "will", "will"]
    assert all(text[start:end].lower().replace("\u2019", "'") == word for word, start, end in found)
    assert list(words_in("")) == [] and list(words_in("3 _\0 \ud800")) == []


def test_only_words_that_were_written_count_also_one_that_the_prompt_begins():
    assert count({"will"}, "will wi", "ll will, not") == (2, 3)
    assert count({"will"}, "will", " not") == (0, 1)
    assert count({"will"}, "will ", "...") == (0, 0)
    assert spans_of({"will"}, "will will willing", 5) == [(5, 9)]
    assert spans_of({"will"}, "a will", 4) == [(4, 6)]


# Highlighting.


def test_words_are_marked_where_there_are_no_colours_and_styled_where_there_are():
    one = Generation("I will", " go: he Will, can't willing", [], "length")
    text = showing.highlighted(one, {"will", "can't"}, coloured=False)
    assert text.plain == "I will go: he *Will*, *can't* willing"
    text = showing.highlighted(one, {"will", "can't"}, coloured=True)
    assert text.plain == "I will go: he Will, can't willing"
    styled = [text.plain[s.start : s.end] for s in text.spans if s.style == showing.HIGHLIGHT]
    assert styled == ["Will", "can't"]
    assert [text.plain[s.start : s.end] for s in text.spans if s.style == "dim"] == ["I will"]
    assert not text.style


def test_what_models_write_is_neither_markup_nor_commands():
    one = Generation("[red]", "[/red] :smile: \x1b[2J\u202e will\r", [], "eos")
    out = terminal(colours=True)
    out.print(showing.highlighted(one, {"will"}, coloured=False))
    assert "[/red] :smile: \\x1b[2J\\u202e *will*\\x0d" in plain(out)
    assert "\x1b[2J" not in plain(out) and "(end of text)" in plain(out)


@pytest.mark.parametrize(
    ("is_terminal", "environment", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_when_there_are_colours(monkeypatch, is_terminal, environment, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = Console(file=io.StringIO(), force_terminal=is_terminal)
    assert showing.has_colours(out) is expected


# Columns.


def written(how, neurons, *texts, perplexities=None):
    """The first text unsteered, the others under the variants of `how`."""
    made = [None, *variants(how, neurons)]
    return [
        Written(variant, [Generation("A", text, [1], "length")], perplexities)
        for variant, text in zip(made, texts, strict=True)
    ]


def shown(width, results, neurons, unit="absolute", num=1):
    out = terminal(width)
    showing.show_texts(out, results, Choice(neurons), unit, num)
    return plain(out)


def test_texts_stand_side_by_side_where_the_columns_are_wide_enough():
    results = written(turning(deltas=(20.0,)), (MODAL,), " dog barks", " dog will bark will")
    lines = shown(80, results, (MODAL,)).splitlines()
    assert any("unsteered" in line and "+20 (1 x maximum)" in line for line in lines)
    assert any("A dog barks" in line and "A dog *will* bark *will*" in line for line in lines)
    assert any("0% of words " in line and "50% of words (unsteered 0%)" in line for line in lines)
    assert max(map(len, lines)) == 80


def test_texts_are_stacked_where_columns_would_be_narrow():
    results = written(turning(deltas=(20.0,)), (MODAL,), " dog barks", " dog will bark will")
    least = 2 * (showing.LEAST_COLUMN + 3) + 1
    assert "unsteered   " in shown(least, results, (MODAL,))
    assert shown(least - 1, results, (MODAL,)).splitlines() == [
        "--- unsteered: 0% of words", "A dog barks", "",
        "--- +20 (1 x maximum): 50% of words (unsteered 0%)", "A dog *will* bark *will*", "",
    ]  # fmt: skip


def test_perplexities_and_texts_without_words():
    results = written(
        turning(deltas=(20.0,)), (MODAL,), "...", "", perplexities=[12.3456]
    )  # fmt: skip
    text = shown(60, results, (MODAL,))
    assert "--- unsteered: no words, perplexity under the twin 12.35" in text
    text = shown(60, written(turning(), (DEAD,), " a", " b"), (DEAD,))
    assert "--- unsteered\nA a\n" in text and "of words" not in text


def test_prompts_and_completions_are_named_in_turn():
    texts = [Generation(p, f" {i}", [1], "length") for i, p in enumerate("abab")]
    text = shown(36, [Written(None, texts, None)], (MODAL,), num=2)
    heads = [line for line in text.splitlines() if line.startswith("===")]
    assert heads == [
        f"=== prompt {i} of 2, completion {j} of 2" for i in (1, 2) for j in (1, 2)
    ]  # fmt: skip
    bodies = [line for line in text.splitlines() if line and line[0] in "ab"]
    assert bodies == ["a 0", "a 2", "b 1", "b 3"]


# What is turned.


def labels(how, *neurons):
    return [showing.label(one, neurons, how.unit) for one in variants(how, neurons)]


def test_labels_in_both_units():
    assert labels(turning(deltas=(10.0, -5.0)), MODAL) == [
        "+10 (0.5 x maximum)", "-5 (-0.25 x maximum)",
    ]  # fmt: skip
    assert labels(turning(unit="maximum", deltas=(2.0,)), MODAL) == ["+40 (2 x maximum)"]
    assert labels(turning(unit="mean", deltas=(2.0,)), MODAL) == ["+10 (2 x mean)"]
    assert labels(turning(SET), MODAL) == ["set to 1 (0.05 x maximum)"]
    assert labels(turning(CLAMP, unit="maximum", deltas=(0.5,)), MODAL) == [
        "at most 10 (0.5 x maximum)"
    ]
    assert labels(turning(SCALE, deltas=(3.0,)), MODAL) == ["times 3"]
    assert labels(turning(ABLATE, ()), MODAL) == ["ablated"]
    assert labels(turning(deltas=(4.0,)), unknown(1, 2)) == ["+4"]
    assert labels(turning(unit="maximum", deltas=(2.0,)), MODAL, OTHER) == ["+2 x maximum"]
    assert labels(turning(SET, unit="mean"), MODAL, OTHER) == ["set to 1 x mean"]
    assert labels(turning(deltas=(4.0,)), MODAL, OTHER) == ["+4"]
    suppressed = turning(unit="maximum", deltas=(1.0,), suppress=True)
    assert labels(suppressed, MODAL) == ["ablated", "-20 (-1 x maximum)"]


def test_each_neuron_is_turned_by_its_own_strength_and_layers_apart():
    (one,) = variants(turning(unit="mean", deltas=(2.0,)), (MODAL, OTHER, DEAD_IN_NAME_ONLY))
    assert one.absolute == (10.0, 4.0, 2.0)
    first, second = one.interventions
    assert (first.layer, first.neuron, first.delta) == (1, (21, 8), (10.0, 2.0))
    assert (second.layer, second.neuron, second.delta) == (0, (3,), (4.0,))


DEAD_IN_NAME_ONLY = Handle(1, 8, (), NAN, 0.1, mean=1.0, maximum=2.0)


@pytest.mark.parametrize(
    ("mode", "kind", "field", "value"),
    [
        (ADD, Add, "delta", (3.0,)),
        (SET, Set, "value", (3.0,)),
        (CLAMP, Clamp, "maximum", (3.0,)),
        (SCALE, Scale, "factor", 3.0),
    ],
)
def test_modes_become_interventions(mode, kind, field, value):
    how = turning(mode, (3.0,), where="generated", before_selection=True)
    (one,) = variants(how, (MODAL,))
    (made,) = one.interventions
    assert type(made) is kind and getattr(made, field) == value
    assert (made.where, made.before_selection) == ("generated", True)


def test_suppressing_ablates_and_subtracts():
    found = variants(turning(deltas=(1.0, 2.0), suppress=True), (MODAL,))
    made = [one.interventions[0] for one in found]
    assert [type(one) for one in made] == [Ablate, Add, Add]
    assert [one.delta for one in found] == [None, -1.0, -2.0]
    assert [one.delta for one in made[1:]] == [(-1.0,), (-2.0,)]


@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        (DEAD, "unit='mean': neuron 1:7 never fires in the analysis"),
        (unknown(0, 4), "unit='mean' needs an analysis of neuron 0:4"),
    ],
)
def test_units_that_a_neuron_does_not_have(neuron, message):
    with pytest.raises(ConfigError, match=message):
        variants(turning(unit="mean"), (MODAL, neuron))


def test_a_list_of_neurons():
    out = terminal(90)
    showing.show_handles(out, [OTHER, MODAL])
    lines = plain(out).splitlines()
    row = next(line for line in lines if "0:3" in line)
    assert row.replace("│", " ").split() == ["0:3", "0.50", "-", "20", "8", "work"]
    row = next(line for line in lines if "1:21" in line)
    assert row.replace("│", " ").split() == ["1:21", "-", "1.50", "10", "20", "will,", "can't"]
