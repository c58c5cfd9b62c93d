"""Figures are well-formed SVG that loads nothing, says no time, and takes a page's colours."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lingua_topk.report.figures import (
    Band,
    lift_against_fluency,
    lines_over_steps,
    over_layers,
    quartiles,
    short,
    svg,
)

SVG = "{http://www.w3.org/2000/svg}"
NAMES = (
    'a $x_1$ <script>1</script> & "b" \\frac{',
    "_begins so",
    "$",
    "a$b$c",
    "x" * 300,
    "",
    "\x00\x1b[m",
    "#010203",
    "'DejaVu Sans', sans-serif",
    ' id="figure_1"',
)


def band(*middle):
    middle = np.array(middle, dtype=float)
    return Band(middle - 0.5, middle, middle + 0.5)


def layers_figure(names=("TopK model",), **given):
    panels = {
        "token entropy (bits)": {**dict.fromkeys(names, band(5, 6, 7)), "shuffled": band(8, 8, 8)},
        "MonoScore": dict.fromkeys(names, band(0.1, 0.2, np.nan)),
    }
    return over_layers([0, 1, 2], panels, controls=["shuffled"], shaded=[2], **given)


def steps_figure(names=("layer 0",), **given):
    series = dict.fromkeys(names, band(8, 7, 6))
    return lines_over_steps([0, 10, 100], series, ylabel="token entropy (bits)", **given)


def lift_figure(names=("neuron",)):
    points = [(1.1, 2.0), (1.5, 6.0), (4.0, 8.0)]
    return lift_against_fluency(dict.fromkeys(names, points), {names[0]: [(1.4, 5.5)]})


ALL = pytest.mark.parametrize("make", [layers_figure, steps_figure, lift_figure])


def texts(drawing):
    return [element.text for element in ET.fromstring(drawing).iter(f"{SVG}text")]


@ALL
@pytest.mark.parametrize("alone", [False, True])
def test_a_figure_is_xml_that_names_its_contents(make, alone):
    drawing = svg(make(), "what it <shows>", alone=alone)
    root = ET.fromstring(drawing)
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox")
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text == "what it <shows>"
    label = "lift of the concept rate" if make is lift_figure else "token entropy (bits)"
    assert label in texts(drawing)


@ALL
def test_the_same_figure_has_the_same_bytes_and_says_no_time(make):
    first, second = svg(make()), svg(make())
    assert first == second
    assert "metadata" not in first and "matplotlib" not in first.lower()
    assert not re.search(r"\b20\d\d-\d\d", first)


@ALL
def test_names_are_text_whatever_is_in_them(make):
    drawing = svg(make(NAMES))
    shown = texts(drawing)
    for name in NAMES:
        line = " ".join("".join(c if c.isprintable() else " " for c in name).split())
        if len(line) > 46:
            line = line[:45] + "\u2026"
        assert not line or line in shown
    assert not list(ET.fromstring(drawing).iter(f"{SVG}script"))


@ALL
def test_nothing_comes_from_elsewhere(make):
    drawing = svg(make())
    links = re.findall(r'href="([^"]*)"', drawing) + re.findall(r"url\(([^)]*)\)", drawing)
    assert links and all(link.startswith("#") for link in links)
    assert set(re.findall(r"font-family: ([^;\"]*)", drawing)) == {"sans-serif"}


@ALL
def test_axes_and_text_take_the_colour_of_the_page(make):
    drawing = svg(make())
    styles = [element.get("style") for element in ET.fromstring(drawing).iter(f"{SVG}text")]
    assert styles and all("fill: currentColor" in style for style in styles)
    assert "#010203" not in drawing and "#000000" not in drawing and "<style" not in drawing
    alone = svg(make(), alone=True)
    assert "prefers-color-scheme: dark" in alone


def test_ids_are_those_that_are_referred_to():
    """A page holds several figures: what matplotlib calls figure_1 would be there twice."""
    drawing = svg(layers_figure())
    ids = re.findall(r' id="([^"]*)"', drawing)
    assert ids and len(set(ids)) == len(ids)
    assert all(f"#{name}" in drawing for name in ids)


def test_layers_without_topk_are_marked_and_named():
    drawing = svg(layers_figure(shaded_label="layers without it"))
    assert "layers without it" in texts(drawing)
    assert "<pattern" in drawing
    plain = svg(over_layers([0, 1], {"y": {"a": band(1, 2)}}))
    assert "pattern" not in plain and "no TopK in the model" not in texts(plain)


def test_a_panel_without_any_value_says_so():
    empty = Band([np.nan] * 2, [np.nan] * 2, [np.nan] * 2)
    panels = {"semantic entropy (bits)": {"model": empty}, "MonoScore": {"model": band(1, 2)}}
    assert texts(svg(over_layers([0, 1], panels))).count("not scored") == 1


@pytest.mark.parametrize("layers", [[0], [3, 7], list(range(40))])
def test_any_choice_of_layers_is_drawn(layers):
    drawing = svg(over_layers(layers, {"y": {"a": band(*range(len(layers)))}}))
    assert "layer" in texts(drawing)


def test_controls_are_grey_and_others_are_not():
    drawing = svg(layers_figure())
    assert "#888888" in drawing and "#0072b2" in drawing.lower()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("steps", [[0, 10, 100], [5, 10, 100_000], [0], [7]])
def test_steps_are_drawn_on_either_axis(log, steps):
    middle = np.arange(len(steps), dtype=float)
    figure = lines_over_steps(
        steps, {"layer 0": Band(middle, middle, middle)}, ylabel="y", log=log, annealed_at=8
    )
    assert {"training step", "annealing ends", "layer 0"} <= set(texts(svg(figure)))


def test_many_layers_have_colours_of_their_own():
    figure = lines_over_steps([1, 2], {f"layer {i}": band(i, i) for i in range(12)}, ylabel="bits")
    (axes,) = figure.axes
    assert len({line.get_color() for line in axes.get_lines()}) == 12


def test_quartiles_leave_out_what_has_no_value():
    found = quartiles(np.array([[1.0, 2, 3, 4, 5], [np.nan, np.nan, 4, 2, np.nan], [np.nan] * 5]))
    np.testing.assert_array_equal(found.low, [2, 2.5, np.nan])
    np.testing.assert_array_equal(found.middle, [3, 3, np.nan])
    np.testing.assert_array_equal(found.high, [4, 3.5, np.nan])


def test_steps_are_written_short():
    assert [short(step) for step in (0, 50, 2000, 1_500_000)] == ["0", "50", "2k", "1.5M"]


def curves(figure):
    """What is drawn as points, without the lines across the figure: by marker, [n, 2]."""
    (at,) = figure.axes
    lines = [line for line in at.get_lines() if line.get_marker() not in ("None", None, "")]
    return [(line.get_marker(), line.get_linestyle(), line.get_xydata().tolist()) for line in lines]


def test_lift_is_drawn_as_a_line_a_method_and_the_chosen_as_hollow_markers():
    methods = {"neuron": [(1.1, 2), (1.5, 6)], "direction": [(1.2, 1.5)]}
    figure = lift_against_fluency(methods, {"direction": [(1.3, 1.4), (1.1, 0.9)]})
    assert curves(figure) == [
        ("o", "-", [[1.1, 2], [1.5, 6]]), ("s", "-", [[1.2, 1.5]]),
        ("s", "None", [[1.3, 1.4], [1.1, 0.9]]),
    ]  # fmt: skip
    assert {"neuron", "direction", "at a chosen delta"} <= set(texts(svg(figure)))
    (at,) = figure.axes
    assert (at.get_xscale(), at.get_yscale()) == ("log", "log")


def test_what_has_no_place_on_logarithmic_axes_is_left_out():
    bad = [(0, 2), (2, 0), (-1, 2), (np.nan, 2), (2, np.inf), (2, -1)]
    figure = lift_against_fluency({"a": [*bad, (3, 4)], "b": bad}, {"a": bad, "b": [(1, 9)]})
    assert [points for _, _, points in curves(figure)] == [[[3, 4]], [], [], [[1, 9]]]
    assert "not scored" not in texts(svg(figure))


@pytest.mark.parametrize("methods", [{}, {"neuron": []}, {"neuron": [(np.nan, 0)]}])
def test_a_figure_without_any_lift_says_so(methods):
    shown = texts(svg(lift_against_fluency(methods, {})))
    assert "not scored" in shown and set(methods) <= set(shown)
    assert "at a chosen delta" not in shown


@pytest.mark.parametrize("point", [(1.01, 1.0), (0.01, 0.02), (1e5, 3000.0)])
def test_no_change_and_the_aims_are_in_sight_wherever_the_points_are(point):
    figure = lift_against_fluency({"neuron": [point]}, {})
    (at,) = figure.axes
    for (low, high), value, marks in (
        (at.get_xlim(), point[0], (1, 2)), (at.get_ylim(), point[1], (1, 5)),
    ):  # fmt: skip
        assert all(low < one < high for one in (value, *marks))
    across = [line for line in at.get_lines() if line.get_marker() == "None"]
    assert {line.get_xdata()[0] for line in across} >= {1, 2}
    assert {line.get_ydata()[0] for line in across} >= {1, 5}
    assert len([text for text in texts(svg(figure)) if re.fullmatch(r"[\d.e+-]+", text)]) >= 4


def test_methods_that_are_controls_are_grey():
    points = {"neuron": [(1.1, 3)], "random neuron": [(1.1, 1)]}
    drawing = svg(lift_against_fluency(points, {}, controls=["random neuron"]))
    assert "#888888" in drawing and "#0072b2" in drawing.lower()
