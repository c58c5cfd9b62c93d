"""Drawings of others made fit for a page that runs and loads nothing it did not bring itself.

Kept are shapes, text and their looks; scripts, handlers, style sheets and links to elsewhere
are not. Looks in `style` attributes become attributes of their own, since the page's security
policy refuses the former. Black becomes the page's text colour and a white ground none, so
that a figure can be read on a dark page.
"""

import re
import xml.etree.ElementTree as ET

from lingua_topk.errors import DataError

NAMESPACE = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
ELEMENTS = set(
    "svg g defs path rect circle ellipse line polyline polygon text tspan title desc use symbol"
    " clipPath linearGradient radialGradient stop marker pattern mask".split()
)
ATTRIBUTES = set(
    "id class d x y x1 x2 y1 y2 cx cy r rx ry dx dy width height viewBox points transform"
    " preserveAspectRatio gradientUnits gradientTransform offset clipPathUnits role"
    " aria-label markerWidth markerHeight refX refY orient patternUnits textLength".split()
)
LOOKS = set(
    "fill fill-opacity fill-rule stroke stroke-width stroke-opacity stroke-dasharray"
    " stroke-dashoffset stroke-linecap stroke-linejoin stroke-miterlimit opacity clip-path"
    " clip-rule font-family font-size font-style font-weight text-anchor stop-color"
    " stop-opacity visibility display dominant-baseline".split()
)
FONT = re.compile(r"(?:(italic|oblique)\s+)?(?:(bold|\d00)\s+)?([\d.]+)px\s+(.+)")
BLACK = {"#000000", "#000", "black"}
WHITE = {"#ffffff", "#fff", "white"}


def cleaned(svg: str, prefix: str) -> str:
    """The drawing as an element for a page, its ids beginning with `prefix`.

    DataError for what is no SVG.
    """
    if "<!ENTITY" in svg:
        raise DataError("a figure declares entities, which no figure of ours does: make it again")
    try:
        root = ET.fromstring(svg)
    except ET.ParseError as error:
        raise DataError(f"a figure is no SVG ({error}): make it again") from None
    if root.tag != f"{{{NAMESPACE}}}svg":
        raise DataError("a figure is no SVG (its root is another element): make it again")
    _clean(root, prefix)
    if "viewBox" in root.attrib:  # then it is as wide as its place
        root.attrib.pop("width", None)
        root.attrib.pop("height", None)
    ET.register_namespace("", NAMESPACE)
    ET.register_namespace("xlink", XLINK)
    return ET.tostring(root, encoding="unicode")


def _clean(element: ET.Element, prefix: str) -> None:
    for child in list(element):
        if _local(child) in ELEMENTS:
            _clean(child, prefix)
        else:
            element.remove(child)
    element.attrib = _attributes(element, prefix)


def _local(element: ET.Element) -> str:
    """The name of an element of SVG, "" of others (comments have no name)."""
    tag = element.tag if isinstance(element.tag, str) else ""
    return tag.removeprefix(f"{{{NAMESPACE}}}") if tag.startswith(f"{{{NAMESPACE}}}") else ""


def _attributes(element: ET.Element, prefix: str) -> dict[str, str]:
    kept: dict[str, str] = {}
    given = {**element.attrib, **_looks(element.attrib.get("style", ""))}
    for name, value in given.items():
        if name in ("href", f"{{{XLINK}}}href"):
            if value.startswith("#"):
                kept["href"] = f"#{prefix}{value[1:]}"
        elif name == "id":
            kept["id"] = prefix + value
        elif name in LOOKS:
            kept[name] = _look(name, value, prefix)
        elif name in ATTRIBUTES:
            kept[name] = value
    return {name: value for name, value in kept.items() if value}


def _looks(style: str) -> dict[str, str]:
    """The declarations of a style attribute; `font: 10px Sans` is taken apart."""
    pairs = (one.partition(":") for one in style.split(";") if ":" in one)
    looks = {name.strip(): value.strip() for name, _, value in pairs}
    found = FONT.fullmatch(looks.pop("font", ""))
    if found:
        slant, weight, size, family = found.groups()
        looks["font-size"] = f"{size}px"
        looks["font-family"] = family
        looks |= {"font-style": slant} if slant else {}
        looks |= {"font-weight": weight} if weight else {}
    return looks


def _look(name: str, value: str, prefix: str) -> str:
    """The value without links elsewhere, in the page's colours; "" for one to leave out."""
    inside = re.fullmatch(r"url\(\s*['\"]?#([^'\")]+)['\"]?\s*\)", value)
    if inside:
        return f"url(#{prefix}{inside[1]})"
    if "(" in value and not re.match(r"rgba?\(", value):
        return ""
    if name in ("fill", "stroke") and value.lower() in BLACK:
        return "currentColor"
    if name == "fill" and value.lower() in WHITE:
        return "none"
    return value
