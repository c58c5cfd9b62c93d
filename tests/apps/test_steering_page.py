"""What a report reads of steering: what was written, none where there is none, else an error."""

import math
from copy import deepcopy

import numpy as np
import pytest

from apps.topk.steering.page_data import read_steering
from lingua_topk.errors import DataError
from lingua_topk.report.data import Layer, SteeredNumbers
from tests.report import made_up
from tests.report.made_up_steering import BAD, CONTENT, HOSTILE, RIVER, write

LAYERS = [
    Layer(index, index == 0, "survivors", {"counts": np.ones(made_up.WIDTH)}, [], np.empty(0, bool))
    for index in made_up.LAYERS
]


def read(folder):
    return read_steering(folder, made_up.described(), LAYERS)


def changed(name, i, **changes):
    """A list of the content with fields of one of its objects changed."""
    found = deepcopy(CONTENT[name])
    found[i].update(changes)
    return {name: found}


def test_there_is_none_where_nothing_was_steered(tmp_path):
    assert read(tmp_path / "steering") is None


def test_numbers_are_those_of_the_chosen_delta_on_the_other_prompts(tmp_path):
    found = read(write(tmp_path))
    assert found.sentences == ["Steering lifts by 6.", BAD]
    first, second = found.concepts
    assert (first.layer, first.neuron) == (0, made_up.ONE_TOKEN)
    assert (first.delta, first.absolute) == (2, 7)
    assert first.words == ["river", "bank"] and first.held_out_words == ["don't", "stone"]
    assert first.numbers == SteeredNumbers(0.07, 0.01, 7, 1.5, 0.5)
    assert math.isnan(second.numbers.score)


def test_examples_are_those_of_the_neuron_first_each_with_its_own_numbers(tmp_path):
    found = read(write(tmp_path)).examples
    assert [(one.concept, one.method, one.delta, one.is_chosen) for one in found] == [
        (0, "neuron", 1, False), (0, "neuron", 2, True), (0, "neuron", 2, True),
        (0, "direction", 0.5, True), (1, "neuron", 4, True),
    ]  # fmt: skip
    assert [one.numbers and one.numbers.lift for one in found] == [3, 7, 7, None, 5]
    assert (found[2].prompt, found[2].unsteered, found[2].steered) == ("The ri", "ver.",
                                                                       "ch riverbed")  # fmt: skip


def test_the_figure_may_be_missing(tmp_path):
    assert read(write(tmp_path)).figure.svg.startswith("<svg")
    (tmp_path / "lift.svg").unlink()
    assert read(tmp_path).figure is None


def test_no_delta_is_one_that_was_chosen(tmp_path):
    first = read(write(tmp_path, **changed("rows", 1, chosen=False))).concepts[0]
    assert math.isnan(first.delta) and first.numbers is None


OTHER = {**CONTENT["checkpoint"], "dim": 7}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "its version is 2, not 1"),
        ({"step": 299}, "it is of step 299, and the analysis of 300"),
        ({"checkpoint": OTHER}, "another model, whose dim is 7, not 150"),
        ({"checkpoint": None}, "checkpoint is None"),
        ({"conclusion": ["a", 1]}, "conclusion holds more than text"),
        ({"conclusion": "a"}, "conclusion is 'a'"),
        ({"rows": {}}, "rows is {}"),
        ({"concepts": [1]}, "concepts holds more than objects"),
        (changed("concepts", 0, neuron=made_up.WIDTH), "neuron 0:150 is not in the analysis"),
        (changed("concepts", 0, layer=1), "neuron 1:7 is not in the analysis"),
        (changed("concepts", 0, neuron=True), "neuron is True"),
        (changed("concepts", 0, words=None), "words is None"),
        (changed("examples", 0, concept="0:3"), "'0:3', which is none of its concepts"),
        (changed("examples", 0, steered=3), "steered is 3"),
        (changed("examples", 0, delta="2"), "delta is '2'"),
        (changed("rows", 1, reported=[1]), "reported is [1]"),
        (changed("rows", 1, reported={"lift": "much"}), "lift is 'much'"),
        (changed("summary", 0, lift_ci95=[1]), "lift_ci95 is [1], not two numbers"),
        (changed("summary", 0, n=None), "n is None"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_file_and_the_field(tmp_path, changes, words):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, **changes))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'steering.json'} is not the steering") and words in said
    assert "apps.topk.steer_eval" in said and "\n" not in said


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_damaged_is_refused(tmp_path, content):
    (tmp_path / "steering.json").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


def test_numbers_beyond_all_measure_are_not_measured(tmp_path):
    huge = changed("rows", 1, reported={"lift": 10**400, "score": 1.0})
    first = read(write(tmp_path, **huge)).concepts[0]
    assert math.isnan(first.numbers.lift) and first.numbers.score == 1


def test_hostile_words_are_kept_as_they_are(tmp_path):
    found = read(write(tmp_path))
    assert [f"{one.layer}:{one.neuron}" for one in found.concepts] == [RIVER, HOSTILE]
    assert found.concepts[1].words == [*reversed(made_up.HOSTILE), "\ud800"]
