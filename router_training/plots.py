"""Pictures of a report as SVG that takes its colours from the page. Knows no measure: curves, bars
and points in, markup out.

matplotlib lays out axes, ticks and text; what it writes is then made fit for a page: text stays
text, colours become the page's own variables (so that light and dark are one picture), and every
picture has a title and a description.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from router_training.errors import TrainingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Colours that the page has; further lines begin anew with another dash."""

LEGEND_COLUMNS = 2

WIDTH_IN = 3.9
"""Narrow, so that the text is still to be read where a phone's width is all there is."""

_INK, _FAINT = "#010101", "#010102"
_COLOURS = {_INK: "var(--ink)", _FAINT: "var(--line)"} | {
    f"#0202{n:02x}": f"var(--s{n})" for n in range(SERIES)
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_MARKS = "osD^vP*X"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "text.parse_math": False,  # names may hold a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True, slots=True)
class Line:
    """`low` and `high` bound a band around y; `quiet` lines are baselines."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """One point, with its name beside it where `named`."""

    name: str
    x: float
    y: float
    named: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """One value for each of the picture's places, None where there is none. `reach` are bounds."""

    name: str
    values: Sequence[float | None]
    reach: Sequence[tuple[float, float] | None] = ()
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """What a picture is called and what it shows, for those who do not see it, and its axes."""

    title: str
    description: str
    x: str = ""
    y: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines and dots over numbers. `diagonal` is where both axes are equal."""

    words: Words
    lines: Sequence[Line]
    dots: Sequence[Dot] = ()
    scale: Literal["linear", "log"] = "linear"
    percent_x: bool = False
    diagonal: bool = False
    sizes: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def svg(self) -> str:
        """Raises TrainingError where matplotlib is not installed."""
        height = 2.9 + _legend_in(sum(bool(line.name) for line in self.lines))
        with _figure(WIDTH_IN, height, self.words) as (axes, made):
            if self.diagonal:
                axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=_DASHES[2])
            for n, line in enumerate(_loud_first(self.lines)):
                _draw_line(axes, line, n, self.sizes.get(line.name, ()))
            for dot in self.dots:
                axes.plot([dot.x], [dot.y], "o", color=_INK, markersize=4 if dot.named else 2.5)
                if dot.named:
                    axes.annotate(
                        dot.name, (dot.x, dot.y), (4, 5), textcoords="offset points", fontsize=8
                    )
            axes.set_xscale(self.scale)
            if self.scale == "log":
                from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

                low, high = axes.get_xlim()
                # Of four powers of ten and more, labels in between would run into each other.
                subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
                axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
            _percent(axes, x=self.percent_x)
            if any(line.name for line in self.lines):
                _legend(axes)
        return made.getvalue()


@dataclass(frozen=True, slots=True)
class BarChart:
    """Horizontal bars at named places, those of one place one under the other."""

    words: Words
    places: Sequence[str]
    bars: Sequence[Bars]

    def svg(self) -> str:
        """Raises TrainingError where matplotlib is not installed."""
        each = len(self.bars)
        height = 0.6 + len(self.places) * (0.13 * each + 0.1) + _legend_in(each)
        with _figure(WIDTH_IN, height, self.words) as (axes, made):
            step = 0.84 / each
            for n, bars in enumerate(self.bars):
                colour = _INK if bars.quiet else _colour(n)
                at = [i + (n - (each - 1) / 2) * step for i in range(len(self.places))]
                some = [(y, v) for y, v in zip(at, bars.values, strict=True) if v is not None]
                axes.barh(
                    [y for y, _ in some],
                    [v for _, v in some],
                    height=0.9 * step,
                    color=colour,
                    alpha=0.35 if bars.quiet else 1.0,
                    label=bars.name,
                )
                for y, reach in zip(at, bars.reach, strict=False):
                    if reach is not None:
                        axes.plot(reach, (y, y), color=_INK, linewidth=0.8)
            axes.set_yticks(range(len(self.places)), [_short(place) for place in self.places])
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            _percent(axes, x=True, y=False)
            _legend(axes)
        return made.getvalue()


def _draw_line(axes: Axes, line: Line, n: int, sizes: Sequence[float]) -> None:
    colour = _INK if line.quiet else _colour(n)
    dash = _DASHES[1] if line.quiet else _DASHES[n // SERIES % len(_DASHES)]
    axes.plot(line.x, line.y, color=colour, linestyle=dash, linewidth=1.6, label=line.name)
    if line.low and not line.quiet:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
    if sizes:
        axes.scatter(line.x, line.y, s=list(sizes), color=colour, marker=_MARKS[n % len(_MARKS)])


def _loud_first(lines: Sequence[Line]) -> list[Line]:
    """Colours are counted over those that have one."""
    return sorted(lines, key=lambda line: line.quiet)


def _colour(n: int) -> str:
    return f"#0202{n % SERIES:02x}"


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _cut(name: str, most: int = 26) -> str:
    """Shorter in the middle: names of one kind differ at their ends."""
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}…{name[-half:]}"


def _percent(axes: Axes, *, x: bool, y: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for axis, wanted in ((axes.xaxis, x), (axes.yaxis, y)):
        if wanted:
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))


def _legend(axes: Axes) -> None:
    """Below the picture, where it hides nothing."""
    shapes, names = axes.get_legend_handles_labels()
    axes.figure.legend(
        shapes,
        [_cut(name) for name in names],
        loc="outside lower center",
        ncols=LEGEND_COLUMNS,
        handlelength=2.4,
    )


def _legend_in(names: int) -> float:
    """Inches that the legend of so many names needs, or the axes would give way to it."""
    return 0.17 * ceil(names / LEGEND_COLUMNS) + 0.06


@contextmanager
def _figure(width: float, height: float, words: Words) -> Iterator[tuple[Axes, io.StringIO]]:
    """The axes to draw on, and where the markup is once the block has ended."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError(
            "reports need the package matplotlib; pip install 'composer[training]'"
        ) from error
    made = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": words.title}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        yield axes, made
        axes.set_xlabel(words.x)
        axes.set_ylabel(words.y)
        made.write(_for_page(_written(figure), words))


def _written(figure: Figure) -> str:
    raw = io.StringIO()
    figure.savefig(raw, format="svg", bbox_inches="tight", pad_inches=0.04, metadata={"Date": None})
    return raw.getvalue()


_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_FONT = re.compile(r"font:\s*([\d.]+)px[^;]*|font-family:[^;]*")


def _for_page(markup: str, words: Words) -> str:
    """matplotlib's document as an element of a page."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(markup)
    for child in list(root):
        if child.tag.endswith("metadata"):
            root.remove(child)
    named = {
        value.partition("#")[2].rstrip(")")
        for element in root.iter()
        for value in element.attrib.values()
        if "#" in value
    }
    for element in root.iter():
        if element.get("id") not in named:
            element.attrib.pop("id", None)
        if "style" in element.attrib:
            element.set("style", _styled(element.attrib["style"]))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", f"{words.title}. {words.description}")
    title = ET.Element(f"{{{_SVG}}}title")
    title.text = words.title
    description = ET.Element(f"{{{_SVG}}}desc")
    description.text = words.description
    root.insert(0, description)
    root.insert(0, title)
    return ET.tostring(root, encoding="unicode")


def _styled(style: str) -> str:
    """The page's colours and its font."""
    for ours, theirs in _COLOURS.items():
        style = style.replace(ours, theirs)
    return _FONT.sub(lambda font: f"font-size: {font[1]}px" if font[1] else "", style)
