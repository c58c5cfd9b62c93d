"""The comparison of neurons with the twin and the controls, on measures that are made up."""

import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from rich.console import Console

from apps.topk.neurons import folder
from apps.topk.neurons.comparison import compare_neurons, tables, write_comparison
from apps.topk.neurons.comparison_text import conclusion
from lingua_topk.errors import DataError
from tests.apps.made_up_analysis import (
    N_TOKENS,
    arrays,
    entropy_of,
    rates_around,
    write_analysis,
    write_part,
)


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    """A model whose entropies are lower only since its neurons fire half as often."""
    return write_analysis(tmp_path_factory.mktemp("rare"), seed=1)


@pytest.fixture(scope="module")
def lower(tmp_path_factory):
    """One whose entropies are lower by 0.8 bits at the same firing rate too."""
    return write_analysis(tmp_path_factory.mktemp("lower"), lower_by=0.8)


@pytest.fixture(scope="module")
def of_rare(rare):
    return compare_neurons(rare)


@pytest.fixture(scope="module")
def of_lower(lower):
    return compare_neurons(lower)


def shown(content, width=100, **given):
    console = Console(width=width, record=True, file=io.StringIO())
    for table in tables(content, **given):
        console.print(table)
    return console.export_text()


def test_rare_firing_alone_makes_populations_differ_and_pairs_not(of_rare):
    found = of_rare["pooled"]["measures"]["token_entropy"]
    assert found["against_twin"]["median_difference"]["high"] < -0.4
    assert found["against_twin"]["cliffs_delta"]["high"] < -0.3
    matched = found["matched"]["twin"]
    assert matched["median_difference"]["low"] < 0 < matched["median_difference"]["high"]
    assert 0.98 < matched["rate_ratio"] < 1.02
    first, unmatched = of_rare["conclusion"][0], of_rare["conclusion"][3]
    assert "have not been found to have lower token entropy than the twin" in first
    assert "includes 0" in first
    assert "Whatever the firing rate" in unmatched


def test_a_difference_at_matched_rate_is_found_and_said(of_lower):
    matched = of_lower["pooled"]["measures"]["token_entropy"]["matched"]["twin"]
    assert matched["median_difference"]["low"] < -0.8 + 0.1
    assert matched["median_difference"]["high"] < -0.6
    line = of_lower["conclusion"][0]
    assert line.startswith(
        "At matched firing rate, TopK layers have lower token entropy than the twin in 2 of 2"
        " layers: median difference -0."
    )
    share, pairs = matched["share_lower"], matched["pairs"]
    assert line.endswith(f"{share:.0%} of {pairs} pairs lower.")
    assert "have higher MonoScore than the twin in 2 of 2 layers" in of_lower["conclusion"][2]


def test_the_opposite_is_said_as_plainly(tmp_path):
    content = compare_neurons(write_analysis(tmp_path, lower_by=-0.8))
    line = content["conclusion"][0]
    assert "TopK layers do not have lower but higher token entropy than the twin in 2 of 2" in line
    assert re.search(r"median difference \+0\.\d+ bits .* pairs higher\.$", line)


def test_summaries_are_those_of_the_arrays(rare, of_rare):
    layers = {name: folder.read_layers(rare / name) for name in ("model", "twin", "random")}
    for i, one in enumerate(of_rare["layers"]):
        assert (one["layer"], one["is_topk"]) == (i, i < 2)
        for measure, found in one["measures"].items():
            for name, population in found["populations"].items():
                if (name, measure) == ("shuffled", "firing_rate"):
                    assert population is None
                    continue
                source = layers["model" if name == "shuffled" else name][i].arrays
                prefix = "shuffled_" if name == "shuffled" else ""
                values = source[prefix + measure]
                values = values[~np.isnan(values)]
                assert population["scored"] == len(values)
                assert population["median"] == np.median(values)
                assert population["quartiles"] == list(np.quantile(values, [0.25, 0.75]))
    semantic = of_rare["layers"][0]["measures"]["semantic_entropy"]["populations"]["model"]
    assert (semantic["neurons"], semantic["scored"], semantic["too_few"]) == (300, 240, 60)


def test_the_pooled_rows_are_those_of_the_topk_layers(of_rare):
    assert of_rare["pooled"]["layers"] == [0, 1]
    for measure, found in of_rare["pooled"]["measures"].items():
        parts = [one["measures"][measure] for one in of_rare["layers"][:2]]
        populations = found["populations"]["model"]
        assert populations["scored"] == sum(p["populations"]["model"]["scored"] for p in parts)
        if measure != "firing_rate":
            for other in ("twin", "random", "shuffled"):
                pairs = [part["matched"][other]["pairs"] for part in parts]
                assert found["matched"][other]["pairs"] == sum(pairs)


def test_pairs_and_left_over_neurons_add_up_to_the_scored_ones(of_rare):
    for measure in ("token_entropy", "semantic_entropy"):
        found = of_rare["layers"][0]["measures"][measure]
        for other in ("twin", "random"):
            matched = found["matched"][other]
            for name, left in (("model", "unmatched_model"), (other, "unmatched_other")):
                scored = found["populations"][name]["scored"]
                assert matched["pairs"] + matched[left] == scored


def test_the_shuffle_is_paired_neuron_by_neuron(rare, of_rare):
    source = folder.read_layers(rare / "model")[0].arrays
    differences = source["token_entropy"] - source["shuffled_token_entropy"]
    found = of_rare["layers"][0]["measures"]["token_entropy"]["matched"]["shuffled"]
    assert found["pairs"] == 300
    assert found["median_difference"]["value"] == pytest.approx(np.median(differences))
    assert found["share_lower"] == (differences < 0).mean()
    assert "unmatched_model" not in found


def test_it_depends_on_the_seed_and_on_nothing_else(rare, of_rare):
    assert compare_neurons(rare) == of_rare
    assert compare_neurons(rare, seed=1)["pooled"] != of_rare["pooled"]


def test_without_a_twin_the_controls_are_compared_with(tmp_path):
    content = compare_neurons(write_analysis(tmp_path, twin=False))
    found = content["pooled"]["measures"]["token_entropy"]
    assert found["against_twin"] is None and found["matched"]["twin"] is None
    assert found["populations"]["twin"] is None
    assert found["matched"]["random"]["pairs"] > 100
    assert content["conclusion"][0].startswith("No twin was measured")
    write_comparison(tmp_path, content)
    assert "matched with the twin" not in (tmp_path / "comparison.md").read_text()
    assert "All neurons against the twin" not in shown(content)


def test_the_model_alone_is_compared_with_its_shuffle(tmp_path):
    draws = np.random.default_rng(0)
    rates = rates_around(0.01, 50, draws)
    write_part(tmp_path / "model", [arrays(rates, entropy_of(rates, draws), draws)], topk=(0,))
    content = compare_neurons(tmp_path)
    write_comparison(tmp_path, content)
    assert content["parts"] == ["model"]
    assert "than their own shuffle in 1 of 1 layer:" in "\n".join(content["conclusion"])


def test_a_model_without_topk_layers_is_described_and_nothing_concluded(tmp_path):
    draws = np.random.default_rng(0)
    rates = rates_around(0.01, 50, draws)
    write_part(tmp_path / "model", [arrays(rates, entropy_of(rates, draws), draws)])
    content = compare_neurons(tmp_path)
    assert content["pooled"] is None
    assert len(content["conclusion"]) == 1
    write_comparison(tmp_path, content)
    assert "layer 0 (no TopK)" in (tmp_path / "comparison.md").read_text()
    assert "layer 0 (no" in shown(content)


def test_dead_unscored_and_few_neurons_give_null_and_never_nan(tmp_path):
    """A layer whose neurons are all dead, and one in which nine are alive."""
    n = 30
    dead = {
        name: np.full(n, np.nan) for name in arrays(*[np.ones(1)] * 2, np.random.default_rng(0))
    }
    dead |= {"counts": np.zeros(n, dtype=np.int64), "firing_rate": np.zeros(n)}
    draws = np.random.default_rng(0)
    rates = rates_around(0.01, 9, draws)
    alive = arrays(rates, entropy_of(rates, draws), draws)
    few = {name: np.concatenate([alive[name], dead[name][9:]]) for name in dead}
    for part in ("model", "twin", "random"):
        write_part(tmp_path / part, [dead, few], topk=(0, 1))
    content = compare_neurons(tmp_path)
    write_comparison(tmp_path, content)
    text = (tmp_path / "comparison.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    found = json.loads(text)["layers"][0]["measures"]["token_entropy"]
    assert found["populations"]["model"] == {
        "neurons": n, "scored": 0, "dead": n, "too_few": 0, "median": None, "quartiles": None,
    }  # fmt: skip
    assert found["matched"]["twin"]["pairs"] == 0
    assert found["matched"]["twin"]["rate_ratio"] is None
    few_pairs = content["layers"][1]["measures"]["token_entropy"]["matched"]["twin"]
    assert few_pairs["median_difference"] is None
    assert few_pairs["reason"] == "too few pairs (9, 10 are needed)"
    assert "no number, too few pairs (9, 10 are needed)" in content["conclusion"][0]
    document = (tmp_path / "comparison.md").read_text()
    assert "too few pairs" in document and "nan" not in document


def test_a_twin_that_was_measured_in_fewer_layers_is_compared_there(tmp_path):
    write_analysis(tmp_path)
    (tmp_path / "twin/layers/00.safetensors").unlink()
    content = compare_neurons(tmp_path)
    without, there = (one["measures"]["token_entropy"] for one in content["layers"][:2])
    assert without["matched"]["twin"] is None and there["matched"]["twin"]["pairs"] > 100
    pooled = content["pooled"]["measures"]["token_entropy"]["matched"]["twin"]
    assert pooled["pairs"] == there["matched"]["twin"]["pairs"]
    write_comparison(tmp_path, content)


def test_the_files_are_what_they_say(rare, of_rare, tmp_path):
    write_comparison(tmp_path, of_rare)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.json",
        "comparison.md",
        "entropy.svg",
    ]
    assert json.loads((tmp_path / "comparison.json").read_text()) == of_rare
    document = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    for table in re.findall(r"(?:^\|.*\n)+", document, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for said in ("not over training seeds", "matched with the twin", "TopK layers together"):
        assert said in document
    first = (tmp_path / "entropy.svg").read_bytes()
    texts = [one.text for one in ET.fromstring(first).iter("{http://www.w3.org/2000/svg}text")]
    for said in ("token entropy (bits)", "semantic entropy (bits)", "MonoScore", "layer", "model",
                 "twin", "random weights", "shuffled", "no TopK in the model"):  # fmt: skip
        assert said in texts
    write_comparison(tmp_path, of_rare)
    assert (tmp_path / "entropy.svg").read_bytes() == first


def test_what_a_file_says_of_itself_is_shown_as_text(tmp_path):
    draws = np.random.default_rng(0)
    rates = rates_around(0.01, 20, draws)
    made = [arrays(rates, entropy_of(rates, draws), draws)]
    write_part(tmp_path / "model", made, topk=(0,), kept="<script>|x|</script>\n# [a](b)")
    content = compare_neurons(tmp_path)
    write_comparison(tmp_path, content)
    document = (tmp_path / "comparison.md").read_text()
    assert "<script>" not in document.replace("\\<script\\>", "")
    assert "\n# [a]" not in document


def test_the_terminal_shows_the_topk_layers_and_each_layer_on_request(of_lower):
    text = shown(of_lower)
    assert "At matched firing rate, TopK layers together" in text
    assert "layer 0" not in text
    estimate = of_lower["pooled"]["measures"]["token_entropy"]["matched"]["twin"]
    assert f"[{estimate['median_difference']['low']:+.3f}, " in text  # and not taken for markup
    every = shown(of_lower, width=140, every_layer=True)
    assert "token entropy (bits), layer 2 (no TopK)" in every


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no measured layers of a model: make them with") as error:
        compare_neurons(tmp_path)
    assert "\n" not in str(error.value)


def test_parts_that_were_measured_on_other_texts_are_refused(tmp_path):
    draws = np.random.default_rng(0)
    rates = rates_around(0.01, 20, draws)
    made = [arrays(rates, entropy_of(rates, draws), draws)]
    write_part(tmp_path / "model", made, topk=(0,))
    write_part(tmp_path / "twin", made, n_tokens=2 * N_TOKENS)
    with pytest.raises(DataError, match=r"different numbers of tokens \(100000, 200000\): analyse"):
        compare_neurons(tmp_path)


def test_a_damaged_layer_is_refused(tmp_path):
    write_analysis(tmp_path, n=10)
    path = tmp_path / "twin/layers/01.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"01\.safetensors is no layer of an analysis"):
        compare_neurons(tmp_path)


def test_the_conclusion_is_made_of_the_numbers(of_lower):
    """With other numbers it says otherwise."""
    changed = json.loads(json.dumps(of_lower))
    matched = changed["pooled"]["measures"]["token_entropy"]["matched"]["twin"]
    matched["median_difference"] = {"value": -0.1, "low": -0.3, "high": 0.1}
    assert "have not been found to have lower" in conclusion(changed)[0]
    for layer in changed["layers"]:
        layer["measures"]["token_entropy"]["matched"]["twin"]["median_difference"]["high"] = 0.1
    matched["median_difference"] = {"value": -0.2, "low": -0.3, "high": -0.1}
    assert "all taken together though in none alone" in conclusion(changed)[0]


def test_the_conclusion_says_how_monoscore_stands_and_whose_vectors_they_are(tmp_path):
    out = write_analysis(tmp_path / "out", twin=False)
    found = compare_neurons(out, vectors="glove\n<b>.txt")["conclusion"]
    assert "Vectors of words: glove <b>.txt." in found
    assert any("MonoScore than their own shuffle" in line for line in found)
    assert not any("Vectors" in line for line in compare_neurons(out)["conclusion"])
