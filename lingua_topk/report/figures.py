"""Figures as SVG text: measures over layers and over training steps, and lift against fluency.

Nothing here touches pyplot or its global state, and nothing in a figure comes from elsewhere:
text is text in whatever sans-serif font the reader has. The same numbers give the same bytes.

Figures are drawn to be read at 360 px. What is black in others is `currentColor` here, so an SVG
that stands in a page takes the page's colour of text, in the dark as well; `alone` adds a
ground and a colour for both, since a file that is opened by itself, or through <img>,
inherits no colour.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# Okabe and Ito's colours that are told apart by colour-blind readers, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
GREY = "#888888"
GREY_LOOKS = (("x", "--"), ("+", ":"), ("1", "-."))

# Stands for `currentColor`, which matplotlib does not know. No drawing of ours has it otherwise.
INK = "#010203"
WIDTH = 5.0  # inches; 360 points, which is 360 px at the smallest
PANEL_HEIGHT = 1.9
# What steering aims at: so many times the unsteered perplexity at most, so much lift at least.
MOST_RATIO, LEAST_LIFT = 2.0, 5.0
GROUND = """\
#figure { color: #1a1a1a; background: #fff }
@media (prefers-color-scheme: dark) { #figure { color: #e8e8e8; background: #16181c } }"""
# matplotlib measures text by the font it brings; the reader's own sans-serif is shown.
MEASURED_FONT = "'DejaVu Sans', sans-serif"
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "hatch.color": INK,
    "hatch.linewidth": 0.7,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "lingua_topk",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "ytick.color": INK,
    "ytick.labelsize": 9,
}


class Band(NamedTuple):
    """A line with a band around it: three sequences of the same length, NaN for no value."""

    low: Sequence[float]
    middle: Sequence[float]
    high: Sequence[float]


def quartiles(values: np.ndarray) -> Band:
    """Median and quartiles of each row of `values`, float [n, D]; NaN are left out.

    A row without any value has NaN.
    """
    rows = [row[~np.isnan(row)] for row in np.asarray(values, dtype=np.float64)]
    found = [np.quantile(row, [0.25, 0.5, 0.75]) if len(row) else [np.nan] * 3 for row in rows]
    low, middle, high = np.array(found).reshape(-1, 3).T
    return Band(low, middle, high)


def over_layers(
    layers: Sequence[int],
    panels: Mapping[str, Mapping[str, Band]],
    *,
    controls: Collection[str] = (),
    shaded: Collection[int] = (),
    shaded_label: str = "no TopK in the model",
) -> Figure:
    """Medians with their quartiles over the layers of a network, a panel a measure.

    Args:
        layers: their indices, ascending.
        panels: by the label of the y axis (with its unit): the bands [layers] by name.
        controls: names that are drawn in grey.
        shaded: layers that are marked with a hatched ground.
        shaded_label: what that says in the legend.
    """
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    looks = _looks(names, controls)
    with matplotlib.style.context(["default", STYLE]):
        figure, axes = _panels(len(panels))
        for at, (label, series) in zip(axes, panels.items(), strict=True):
            _shade(at, shaded)
            for place, name in enumerate(names):
                if name in series:
                    shift = _shift(place, len(names), layers)
                    _bars(at, np.asarray(layers) + shift, series[name], looks[name])
            at.set_ylabel(label)
            at.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
            at.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            _say_if_empty(at, series.values())
        axes[-1].set_xlabel("layer")
        entries: list[tuple[Artist, str]] = [(_handle(looks[name]), name) for name in names]
        if set(shaded) & set(layers):
            entries.append((Patch(**_SHADE), shaded_label))
        _legend(figure, entries)
    return figure


def lines_over_steps(
    steps: Sequence[int],
    series: Mapping[str, Band],
    *,
    ylabel: str,
    xlabel: str = "training step",
    title: str = "",
    log: bool = False,
    annealed_at: int | None = None,
    controls: Collection[str] = (),
) -> Figure:
    """Lines with quartile bands over training steps, such as one for each layer.

    Args:
        steps: ascending.
        series: the bands [steps] by name. Up to six have colours that are told apart without
            colour vision; of more, taken to be in an order such as that of layers, each is
            lighter than the one before.
        ylabel: with its unit.
        log: a logarithmic x axis; linear between 0 and the first step after it.
        annealed_at: the step at which annealing ends, marked by a vertical line.
        controls: names that are drawn in grey.
    """
    looks = _looks(list(series), controls)
    with matplotlib.style.context(["default", STYLE]):
        figure, (at,) = _panels(1, PANEL_HEIGHT + 0.7)
        for name, band in series.items():
            look = looks[name]
            low, middle, high = (np.asarray(one, dtype=np.float64) for one in band)
            at.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
            at.plot(steps, middle, markersize=3.5, linewidth=1.4, **look)
        at.set_ylabel(ylabel)
        at.set_xlabel(xlabel)
        at.set_title(title)
        _step_axis(at, steps, log)
        _say_if_empty(at, series.values())
        entries: list[tuple[Artist, str]] = [(_handle(looks[name]), name) for name in series]
        if annealed_at is not None:
            look = {"color": INK, "linestyle": (0, (5, 3)), "linewidth": 1.0}
            at.axvline(annealed_at, **look)
            entries.append((Line2D([], [], **look), "annealing ends"))
        _legend(figure, entries)
    return figure


def lift_against_fluency(
    methods: Mapping[str, Sequence[tuple[float, float]]],
    chosen: Mapping[str, Sequence[tuple[float, float]]],
    *,
    controls: Collection[str] = (),
) -> Figure:
    """What steering gains and what it costs: a line a method, both axes logarithmic.

    Points are (perplexity ratio, lift), both relative to unsteered text. Those that are not
    finite or not above 0 have no place on these axes and are left out. Lines mark no change, and
    what steering aims at: a ratio of at most 2 and a lift of at least 5.

    Args:
        methods: by name the points, such as medians over concepts, in order of delta.
        chosen: by name the points at a chosen delta, such as one for each concept; their markers
            are larger and hollow.
        controls: names that are drawn in grey.
    """
    looks = _looks(list(dict.fromkeys([*methods, *chosen])), controls)
    paths = {name: _positive(points) for name, points in methods.items()}
    marked = {name: _positive(points) for name, points in chosen.items()}
    everything = np.concatenate([np.empty((0, 2)), *paths.values(), *marked.values()])
    with matplotlib.style.context(["default", STYLE]):
        figure, (at,) = _panels(1, PANEL_HEIGHT + 1.6)
        _log_axis(at.xaxis, [*everything[:, 0], 1.0, MOST_RATIO])
        _log_axis(at.yaxis, [*everything[:, 1], 1.0, LEAST_LIFT])
        _aims(at)
        for name, points in paths.items():
            at.plot(*points.T, markersize=4.5, linewidth=1.2, **looks[name])
        for name, points in marked.items():
            at.plot(*points.T, **_hollow(looks[name]))
        at.set_xlabel("perplexity ratio (1: as fluent as unsteered)")
        at.set_ylabel("lift of the concept rate")
        if not len(everything):
            at.text(0.5, 0.5, "not scored", transform=at.transAxes, ha="center", va="center")
        entries: list[tuple[Artist, str]] = [(_handle(look), name) for name, look in looks.items()]
        if any(len(points) for points in marked.values()):
            look = _hollow({"color": INK, "marker": MARKERS[0]})
            entries.append((Line2D([], [], **look), "at a chosen delta"))
        _legend(figure, entries)
    return figure


def svg(figure: Figure, description: str = "", *, alone: bool = False) -> str:
    """A figure as the text of one <svg> element, the same for the same figure.

    Args:
        description: what it shows, for those who do not see it.
        alone: for a file of its own, with a ground, light or dark as the reader prefers;
            otherwise for a page, whose colours it takes.
    """
    with matplotlib.style.context(["default", STYLE]):
        buffer = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=none)
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(buffer.getvalue())
    _make_fit(root, alone)
    if description:
        title = ET.Element(f"{{{SVG}}}title")
        title.text = _one_line(description)
        root.insert(0, title)
    return ET.tostring(root, encoding="unicode") + "\n"


def _make_fit(root: ET.Element, alone: bool) -> None:
    """Colours, fonts and ids of a page in place of those of matplotlib."""
    used = set(re.findall(r"#([\w-]+)", " ".join(_values(root))))
    for element in root.iter():
        for child in list(element):
            if _tag(child) in ("metadata", "style"):  # a style would hold for the whole page
                element.remove(child)
        if element.get("id") not in used:  # several figures of a page would have the same
            element.attrib.pop("id", None)
        style = element.get("style", "")
        if style:
            style = style.replace(INK, "currentColor")
            element.set("style", style.replace(MEASURED_FONT, "sans-serif"))
    root.set("role", "img")
    root.set("stroke-linejoin", "round")  # what the style said
    if alone:
        root.set("id", "figure")
        ground = ET.Element(f"{{{SVG}}}style")
        ground.text = GROUND
        root.insert(0, ground)


def _values(root: ET.Element) -> Iterator[str]:
    return (value for element in root.iter() for value in element.attrib.values())


def _tag(element: ET.Element) -> str:
    return element.tag.removeprefix(f"{{{SVG}}}")


# Parts of a figure -------------------------------------------------------------------------

_SHADE = {"facecolor": "none", "edgecolor": INK, "hatch": "///", "linewidth": 0, "alpha": 0.55}


def _panels(n: int, height: float = PANEL_HEIGHT) -> tuple[Figure, list[Axes]]:
    """Panels above each other, which share the x axis: side by side they would be too small."""
    figure = Figure(figsize=(WIDTH, n * height + 0.8), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(n, 1, sharex=True)))
    for at in axes:
        at.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    figure.align_ylabels(axes)
    return figure, axes


def _looks(names: Sequence[str], controls: Collection[str]) -> dict[str, dict]:
    """Colour, marker and dashes of every name, so that none is told apart by colour alone."""
    plain = [name for name in names if name not in controls]
    colours = COLOURS if len(plain) <= len(COLOURS) else _shades(len(plain))
    found = {
        name: {"color": colours[i], "marker": MARKERS[i % len(MARKERS)], "linestyle": "-"}
        for i, name in enumerate(plain)
    }
    for i, name in enumerate(one for one in names if one in controls):
        marker, dashes = GREY_LOOKS[i % len(GREY_LOOKS)]
        found[name] = {"color": GREY, "marker": marker, "linestyle": dashes}
    return found


def _shades(n: int) -> list[tuple[float, ...]]:
    """Ordered colours: neither end so dark or so light that it is lost on a page."""
    return [tuple(colour) for colour in matplotlib.colormaps["plasma"](np.linspace(0.25, 0.85, n))]


def _shift(place: int, n: int, layers: Sequence[int]) -> float:
    """How far from the layer's place a series stands, so that bars do not hide each other."""
    return 0.0 if len(layers) == 0 else (place - (n - 1) / 2) * 0.6 / max(n, 1)


def _bars(at: Axes, x: np.ndarray, band: Band, look: dict) -> None:
    """A marker at each median, a bar from quartile to quartile, a thin line between medians."""
    low, middle, high = (np.asarray(one, dtype=np.float64) for one in band)
    many = len(x) > 12
    at.vlines(x, low, high, color=look["color"], linewidth=1.0 if many else 2.0, alpha=0.7)
    at.plot(x, middle, linewidth=0.9, markersize=2.5 if many else 4.5, **look)


def _shade(at: Axes, layers: Collection[int]) -> None:
    for layer in layers:
        at.axvspan(layer - 0.5, layer + 0.5, zorder=0, **_SHADE)


def _say_if_empty(at: Axes, bands: Collection[Band]) -> None:
    if not any(np.isfinite(np.asarray(band.middle, dtype=np.float64)).any() for band in bands):
        at.text(0.5, 0.5, "not scored", transform=at.transAxes, ha="center", va="center")
        at.set_yticks([])


def _positive(points: Sequence[tuple[float, float]]) -> np.ndarray:
    """float64 [n, 2], without the points that logarithmic axes have no place for."""
    found = np.array(points, dtype=np.float64).reshape(-1, 2)
    return found[(np.isfinite(found) & (found > 0)).all(1)]


def _hollow(look: dict) -> dict:
    return {**look, "linestyle": "none", "fillstyle": "none", "markersize": 8, "alpha": 0.8}


def _log_axis(axis: Axis, values: Sequence[float]) -> None:
    """From below the least to above the largest of the values, with round numbers."""
    low, high = min(values), max(values)
    name = axis.axis_name
    axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (low / 1.25, high * 1.25)})
    is_wide = high / low > 300
    axis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _aims(at: Axes) -> None:
    """No change as a thin line, what is aimed at as dashes with its number."""
    for line in (at.axvline, at.axhline):
        line(1, color=INK, linewidth=0.8, alpha=0.5, zorder=0)
    aim = {"color": INK, "linewidth": 1.0, "linestyle": (0, (5, 3)), "zorder": 0}
    at.axvline(MOST_RATIO, **aim)
    at.axhline(LEAST_LIFT, **aim)


def _step_axis(at: Axes, steps: Sequence[int], log: bool) -> None:
    positive = [step for step in steps if step > 0]
    if log and positive:
        if len(positive) < len(steps):
            at.set_xscale("symlog", linthresh=min(positive))
        else:
            at.set_xscale("log")
        at.set_xticks(_log_ticks(list(steps)))
        at.xaxis.set_minor_locator(NullLocator())
        at.xaxis.set_minor_formatter(NullFormatter())
    else:
        at.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    at.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short(step)))


def _log_ticks(steps: list[int]) -> list[int]:
    """Some of the steps themselves: about six, each at least half again the one before."""
    found: list[int] = []
    least = max((max(steps) / max(min(s for s in steps if s > 0), 1)) ** (1 / 6), 1.5)
    for step in steps:
        if not found or step >= max(found[-1], 1e-9) * least:
            found.append(step)
    return found


def short(step: float) -> str:
    """2,000 steps as 2k, 1,500,000 as 1.5M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(step) >= unit:
            return f"{step / unit:g}{name}"
    return f"{step:g}"


def _handle(look: dict) -> Line2D:
    return Line2D([], [], linewidth=1.4, markersize=4.5, **look)


def _legend(figure: Figure, entries: Sequence[tuple[Artist, str]]) -> None:
    """Above the panels. Names are set afterwards: a legend drops those that begin with _."""
    if not entries:
        return
    longest = max(len(name) for _, name in entries)
    columns = 1 if longest > 34 else 2 if longest > 16 else 3 if longest > 9 else 4
    legend = figure.legend(
        [handle for handle, _ in entries],
        ["-"] * len(entries),
        loc="outside upper center",
        ncols=min(columns, len(entries)),
    )
    for text, (_, name) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(_shortened(name))


def _shortened(name: str, most: int = 46) -> str:
    name = _one_line(name)
    return name if len(name) <= most else f"{name[: most - 1]}\u2026"


def _one_line(text: str) -> str:
    """Without what XML may not hold, such as control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
