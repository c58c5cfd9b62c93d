"""What the page is made of: chunks, quantised values, drawings, and the file as a whole."""

import base64
import hashlib
import json
import re
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest

from lingua_topk.errors import DataError
from lingua_topk.report.chunks import narrow, pack, quantised
from lingua_topk.report.data import (
    Figure,
    Layer,
    Report,
    SteeredConcept,
    SteeredExample,
    SteeredNumbers,
    Steering,
    Table,
    Text,
)
from lingua_topk.report.page import MARK, page
from lingua_topk.report.svg import cleaned


def unpack(text):
    """As scripts/data.js reads a chunk."""
    content = zlib.decompress(base64.b64decode(text))
    (length,) = struct.unpack("<I", content[:4])
    header = json.loads(content[4 : 4 + length])
    begin = -(-(4 + length) // 8) * 8
    arrays = {
        name: np.frombuffer(
            content, f"<{one['type']}", int(np.prod(one["shape"])), begin + one["at"]
        ).reshape(one["shape"])
        for name, one in header["arrays"].items()
    }
    return arrays, header["values"], header


def chunks_of(html):
    found = re.findall(r'id="chunk-([\w-]+)">([\w+/=]*)</script>', html)
    return {name: unpack(text)[:2] for name, text in found}


def small(**changes) -> Report:
    """Three neurons of one layer, with nothing measured but how often they fire."""
    layer = Layer(4, True, "survivors", {"counts": np.array([3, 0, 1])}, [[("a", 2.0)], [], []],
                  np.array([True, False, False]))  # fmt: skip
    given = {"title": "t", "facts": [("a", "b")], "layers": [layer], "pieces": [b"a", b"\xff", b""],
             "rows": np.array([[0, 1, 2, 0]])}  # fmt: skip
    return Report(**{**given, **changes})


def steering(text: str = "text", **changes) -> Steering:
    numbers = SteeredNumbers(0.1, 0.05, np.inf, 1.5, np.nan)
    given = {
        "sentences": [text], "figure": Figure(text, text, SVG_LINE),
        "methods": Table("Methods", ["Method"], [[text]], ""),
        "concepts": [SteeredConcept(4, 0, [text], [text], np.nan, 2.0, None)],
        "examples": [SteeredExample(0, text, 2.0, 4.0, True, text, text, text, numbers)],
    }  # fmt: skip
    return Steering(**{**given, **changes})


SVG_LINE = '<svg xmlns="http://www.w3.org/2000/svg"><path id="a" d="M0 0"/></svg>'


@pytest.mark.parametrize("values", [{}, {"a": 1, "bb": ["é</script>"]}, {"abc": "x" * 9}])
def test_a_chunk_gives_back_what_it_holds(values):
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5,
        "b": np.array([[-128, 127, 3]], dtype=np.int8),
        "none": np.empty((0, 4), np.uint16),
        "big": np.array([2**32 - 1], dtype=">u4").astype(np.uint32),
        "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }
    text = pack(arrays, values)
    assert re.fullmatch(r"[\w+/=]+", text)  # nothing that HTML could take for its own
    found, found_values, header = unpack(text)
    assert found_values == values
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert header["arrays"][name]["at"] % 8 == 0


def test_a_chunk_holds_no_type_that_the_page_does_not_read():
    with pytest.raises(TypeError, match="float64"):
        pack({"x": np.zeros(3)}, {})


def test_ids_take_as_little_room_as_they_can():
    ids = np.array([0, 2**16 - 1])
    assert narrow(ids, 2**16).dtype == np.uint16
    assert narrow(ids, 2**16 + 1).dtype == np.uint32


def test_quantised_values_are_near_keep_their_sign_and_are_never_lost():
    draws = np.random.default_rng(0)
    values = draws.normal(0, 1, (50, 4, 7)).astype(np.float32)
    largest = np.abs(values).max((1, 2), keepdims=True)
    found = quantised(values, largest, np.int8)
    assert found.dtype == np.int8
    assert np.abs(found / 127 * largest - values).max() <= (largest / 127).max()
    assert np.array_equal(np.sign(found), np.sign(values))
    assert quantised(np.array([1e-9, 0, -1e-9]), np.array(1.0), np.int8).tolist() == [1, 0, -1]
    assert quantised(np.array([0.0]), np.array(0.0), np.int8).tolist() == [0]
    assert quantised(np.array([-3.0, 9]), np.array(2.0), np.int8).tolist() == [-127, 127]


@pytest.mark.parametrize("steered", [None, steering()], ids=["plain", "steered"])
def test_the_page_loads_nothing_and_runs_its_own_script_only(steered):
    html = page(small(steering=steered))
    assert html.startswith(MARK)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy and "http" not in policy
    for tag, part in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{part} 'sha256-{digest}'" in policy
    inside = html.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|url\(|@import|src=", inside)
    assert "innerHTML" not in html and "eval(" not in html
    assert "{{" not in re.sub(r"\$\{\{|<script>.*?</script>", "", html, flags=re.DOTALL)


def test_the_same_report_gives_the_same_page():
    assert page(small()) == page(small())
    assert page(small(steering=steering())) == page(small(steering=steering()))


def test_text_cannot_leave_the_data():
    bad = "</script><!-- <script>alert(1)</script> \0\u202e\ud800 {{script}}"
    html = page(small(title=bad, facts=[(bad, bad)], sentences=[bad], texts=[
        Text(bad, np.array([0, 1]), {}),
    ]))  # fmt: skip
    plain = page(small())
    html.encode()  # no lone surrogate stands in it
    for end in ("</script", "<script", "<!--"):
        extra = html.lower().count(end) - plain.lower().count(end)
        assert extra == (2 if "script" in end else 0)  # the chunks of the text
    assert not re.search("[\0\u202e]", html)
    meta = json.loads(re.search(r'id="meta">(.*?)</script>', html, re.DOTALL)[1])
    assert meta["title"] == bad and meta["sentences"] == [bad]


def test_steered_text_cannot_leave_the_data():
    bad = "</script><!-- <script>alert(1)</script> \0\u202e\ud800 {{script}} {{figure}}"
    html, plain = (page(small(steering=steering(text))) for text in (bad, "plain"))
    html.encode()
    for end in ("</script", "<script", "<!--"):
        assert html.lower().count(end) == plain.lower().count(end)
    assert not re.search("[\0\u202e]", html)
    values = chunks_of(html)["steering"][1]
    assert values["sentences"] == [bad] and values["methods"]["rows"] == [[bad]]
    (example,), (concept,) = values["examples"], values["concepts"]
    assert [example[name] for name in ("prompt", "unsteered", "steered", "method")] == [bad] * 4
    assert concept["name"] == "4:0" and concept["words"] == concept["heldOut"] == [bad]


def test_the_part_on_steering_is_there_only_where_something_was_steered():
    with_it, without = page(small(steering=steering())), page(small())
    assert 'id="steering-a"' in with_it and 'href="#steering"' in with_it
    ours = re.sub(r"<(script|style)>.*?</\1>", "", without, flags=re.DOTALL)
    assert "teering" not in ours and "steering" not in chunks_of(without)
    assert "<figure>" not in page(small(steering=steering(figure=None)))


def test_numbers_of_steering_that_are_none_are_null():
    values = chunks_of(page(small(steering=steering())))["steering"][1]
    assert values["examples"][0]["numbers"] == {
        "rate": 0.1, "unsteeredRate": 0.05, "lift": None, "ratio": 1.5, "score": None,
    }  # fmt: skip
    assert values["concepts"][0]["delta"] is None and values["concepts"][0]["numbers"] is None


def test_what_was_not_measured_is_missing_and_no_error():
    chunks = chunks_of(page(small()))
    arrays, values = chunks["table"]
    assert np.isnan(arrays["token_entropy"]).all()
    assert arrays["dead"].tolist() == [0, 1, 0]
    assert values["pieces"] == ["a", {"hex": "ff"}, {"name": "special"}]
    assert values["words"] == [["a"], [], []]
    arrays, values = chunks["4-0"]
    assert arrays["counts"].tolist() == [3, 0, 1]
    assert "context_tokens" not in arrays
    assert values["words"] == [[["a", 2.0]], [], []]


def test_contexts_hold_their_tokens_and_nothing_beyond_their_row():
    layer = Layer(0, True, "survivors", {
        "counts": np.array([2]), "maximum": np.array([4.0]),
        "context_rows": np.array([[1, 0, -1]]), "context_positions": np.array([[3, 0, -1]]),
        "context_starts": np.array([[2, 0, -1]]),
        "context_values": np.array([[[0, 4, 9], [-2, 0, 0], [7, 7, 7]]], dtype=np.float32),
    }, [[]], np.array([False]))  # fmt: skip
    rows = np.array([[0, 1, 1, 0], [1, 0, 0, 1]])
    arrays, _ = chunks_of(page(small(layers=[layer], rows=rows)))["0-0"]
    assert arrays["context_tokens"].tolist() == [[[0, 1, 3], [0, 1, 1], [3, 3, 3]]]
    assert arrays["context_values"].tolist() == [[[0, 127, 0], [-64, 0, 0], [0, 0, 0]]]
    assert arrays["context_peaks"].tolist()[0][:2] == [1, 0]


def test_a_drawing_keeps_its_looks_and_loses_what_could_act():
    svg = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
      viewBox="0 0 9 9" width="90" onload="alert(1)"><script>alert(1)</script>
      <style>* { fill: url(http://x/y) }</style><foreignObject><b>b</b></foreignObject>
      <defs><clipPath id="c"><path id="p" d="M0 0"/></clipPath></defs>
      <g clip-path="url(#c)"
       style="fill: #000000; stroke: url('http://x/z'); font: italic 10px 'A B'">
      <text x="1">a &lt;b&gt;</text></g>
      <use xlink:href="#p"/><use href="http://x/#p"/><image href="http://x"/><a href="x">a</a>
      <rect fill="white" onclick="alert(1)" style="stroke-width: 2"/></svg>"""
    found = cleaned(svg, "f-")
    assert not re.search(
        r"script|onload|onclick|foreign|http://x|image|<style| style=|alert", found
    )
    root = ET.fromstring(found)
    names = {name: one for one in root.iter() for name in [one.tag.rpartition("}")[2]]}
    assert "width" not in root.attrib and root.get("viewBox") == "0 0 9 9"
    assert names["g"].attrib == {
        "clip-path": "url(#f-c)", "fill": "currentColor", "font-size": "10px",
        "font-family": "'A B'", "font-style": "italic",
    }  # fmt: skip
    assert names["text"].text == "a <b>"
    assert [one.get("href") for one in root.iter(f"{{{'http://www.w3.org/2000/svg'}}}use")] == [
        "#f-p", None,
    ]  # fmt: skip
    assert names["rect"].attrib == {"fill": "none", "stroke-width": "2"}


@pytest.mark.parametrize(
    "text", ["", "<html/>", "<svg/>", "no", '<!DOCTYPE a [<!ENTITY b "c">]><svg>&b;</svg>']
)
def test_what_is_no_drawing_is_refused(text):
    with pytest.raises(DataError, match="figure"):
        cleaned(text, "f-")
