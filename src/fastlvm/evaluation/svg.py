"""A matplotlib figure as SVG to stand inside an HTML page, beside others, in the page's own colours and font."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from fastlvm.evaluation.wording import line

_LINK = "{http://www.w3.org/1999/xlink}href"
_LONG = re.compile(r"-?\d+\.\d{3,}")
_FAMILY = re.compile(r"(font: [^;']*?[\d.]+px) [^;]*")
_REFERENCE = re.compile(r"#([\w-]+)")
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def inline(figure: Any, prefix: str, label: str, colours: Mapping[str, str]) -> str:
    """An <svg> element, the same for the same figure. prefix: begins all its ids, so that no two elements of a page
    share one; label: what the drawing shows, for those who do not see it; colours: by "#rrggbb", what CSS says instead.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    _drop(root)
    used = {name for element in root.iter() for name in _referred(element)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = _attributes(element.attrib, prefix, used, colours)
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-label": line(label)}
    return ElementTree.tostring(root, encoding="unicode")


def _drop(root: ElementTree.Element) -> None:
    """Take out what the page has itself, a style for everything, or does not want, the metadata."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)


def _referred(element: ElementTree.Element) -> set[str]:
    return {
        name
        for key, value in element.attrib.items()
        if key == _LINK or "url(#" in value
        for name in _REFERENCE.findall(value)
    }


def _attributes(
    attributes: Mapping[str, str], prefix: str, used: set[str], colours: Mapping[str, str]
) -> dict[str, str]:
    found = {}
    for key, value in attributes.items():
        if key == "id":
            if value in used:
                found["id"] = f"{prefix}-{value}"
        elif key == _LINK:
            found["href"] = f"#{prefix}-{value[1:]}"
        elif key == "style":
            for colour, variable in colours.items():
                value = value.replace(colour, variable)
            found["style"] = _FAMILY.sub(r"\1 system-ui, sans-serif", value)
        else:
            found[key] = _LONG.sub(_rounded, value.replace("url(#", f"url(#{prefix}-"))
    return found


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
