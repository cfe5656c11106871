"""Curves as SVG that stands in the page, in the page's own colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from terseformer.report.runs import Points

NUM_COLOURS = 8
DASHES = ("", "5 2", "1.5 1.5", "5 2 1.5 2")
"""How lines are broken, so that they differ without colour too; as in SVG."""
_MOST_POINTS = 400
_MARKED_POINTS = 12
_INK = "#020000"
"""What stands for the colour of the text."""
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "grid.color", "xtick.color", "ytick.color"), _INK),
}


def draw(lines: Sequence[Points], description: str) -> Markup:
    """Lines over the steps of a training, as an `<svg>` element.

    Colours are the page's: `currentColor`, and of line i `var(--line-i)`, i below `NUM_COLOURS`.

    Args:
        lines: the points of each; numbers that are not finite are left out.
        description: the figure in words, another one for each figure of a page.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": description}):  # ids, which differ between figures
        figure = Figure(figsize=(5, 2.7), layout="constrained")
        axes = figure.subplots()
        for index, points in enumerate(lines):
            steps, values = _thin(points)
            dashes = tuple(map(float, DASHES[index % len(DASHES)].split()))
            axes.plot(
                steps,
                values,
                color=f"#0100{index % NUM_COLOURS:02x}",
                linestyle=(0, dashes) if dashes else "solid",
                linewidth=1.4,
                marker="o" if len(steps) <= _MARKED_POINTS else "",
                markersize=3,
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid()
        box = io.BytesIO()
        figure.savefig(box, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(box.getvalue(), description)


def _thin(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values; of many points, the means of neighbours."""
    numbers = np.array(points, np.float64).reshape(-1, 2)
    numbers = numbers[np.isfinite(numbers[:, 1])]
    groups = np.array_split(numbers, min(_MOST_POINTS, len(numbers))) if len(numbers) else []
    means = np.array([group.mean(axis=0) for group in groups]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def _for_page(svg: bytes, description: str) -> Markup:
    """An SVG file as an element of a page, without what would reach beyond it: namespaces, styles and unused names."""
    root = ElementTree.fromstring(svg)
    referred = set(re.findall(rb"#([\w-]+)", svg))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for child in [c for c in element if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            element.remove(child)
        for name in [name for name in element.attrib if "}" in name]:  # xlink:href
            element.set(name.rpartition("}")[2], element.attrib.pop(name))
        if element.get("id", "").encode() not in referred:
            element.attrib.pop("id", None)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", description)
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r"#0100(\d\d)", lambda found: f"var(--line-{int(found[1])})", text)
    return Markup(text.replace(_INK, "currentColor"))
