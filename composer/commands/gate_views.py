"""A gate's weights by token, drawn: in the terminal, as a page, as a picture. Knows no engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import BytesIO
from itertools import groupby

from rich.text import Text

from composer.errors import SettingsError
from composer.types import GateTrace, TokenGates

COLOURS = (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#8da0cb", "#a6d854",
    "#e5c494", "#b3b3b3",
)  # fmt: skip
"""Okabe and Ito's, told apart by the colour-blind too, then some more; members beyond share them.
All are light enough for black letters."""

SURE = 0.75
"""Weight from which a token is set in bold."""

MOST_IN_PICTURE = 400
"""Tokens: more would not be read, and make a picture of many megabytes."""


def groups_of(trace: GateTrace) -> tuple[str, ...]:
    first = next(iter((*trace.prompt, *_answer(trace))), None)
    return () if first is None else tuple(first.weights)


def in_terminal(trace: GateTrace, *, colours: bool) -> Iterator[Text]:
    """Prompt and answer by group. With colours each token has that of its largest member, bold
    where it is sure; without, runs of one member stand behind its name."""
    colour = _colours(trace)
    for group in groups_of(trace):
        yield Text(group, style="bold")
        for title, tokens in (("prompt", trace.prompt), ("answer", _answer(trace))):
            line = Text(f"  {title}: ")
            if colours:
                for token in tokens:
                    line.append(_shown(token.token), _style(token.weights[group], colour))
            else:
                line.append(" ".join(_runs(tokens, group)))
            yield line
        shares = _shares((*trace.prompt, *_answer(trace)), group)
        legend = Text("  ")
        for name in sorted(shares, key=lambda name: -shares[name]):
            legend.append(f" {name} ", f"black on {colour[name]}" if colours else "")
            legend.append(f" {shares[name]:.0%}  ")
        yield legend
    if trace.left_out:
        yield Text(f"{trace.left_out} tokens beyond the limit are left out", style="dim")


def page(expert: str, trace: GateTrace) -> str:
    """Self-contained HTML: no script, nothing fetched. A token's colour is its largest member's,
    the stronger the larger; all its members are told when the pointer is on it."""
    colour = _colours(trace)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(expert)}</title>',
        "<style>body{font:16px/1.7 system-ui,sans-serif;margin:2em;max-width:60em;color:#111;"
        "background:#fff}p{white-space:pre-wrap;font-family:ui-monospace,monospace}"
        "span{border-radius:3px;padding:1px 0}b{padding:2px 6px;border-radius:3px;margin-right:8px}"
        "</style>",
        f"<h1>{escape(expert)}: who spoke at which token</h1><div>",
        *(f'<b style="background:{colour[name]}">{escape(name)}</b>' for name in trace.members),
        "</div>",
    ]
    for group in groups_of(trace):
        parts.append(f"<h2>{escape(group)}</h2>")
        for title, tokens in (("prompt", trace.prompt), ("answer", _answer(trace))):
            parts.append(f"<h3>{title}</h3><p>")
            parts += [_span(token, group, colour) for token in tokens]
            parts.append("</p>")
    if trace.left_out:
        parts.append(f"<p>{trace.left_out} tokens beyond the limit are left out</p>")
    return "".join(parts) + "</html>\n"


def picture(expert: str, trace: GateTrace) -> bytes:
    """A PNG: members down, tokens across, a panel for each group. Raises SettingsError where
    matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError(
            "pictures need the package matplotlib; pip install 'composer[training]', or write a "
            "page by --html, which needs nothing"
        ) from error
    tokens = (*trace.prompt, *_answer(trace))[-MOST_IN_PICTURE:]
    groups = groups_of(trace)
    answer = len(_answer(trace))
    high = 0.6 + 0.25 * len(trace.members)
    size = (max(4.0, 2.0 + 0.17 * len(tokens)), 1.2 + (high + 0.7) * max(1, len(groups)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(expert)
    for number, group in enumerate(groups):
        axes = figure.add_subplot(len(groups), 1, number + 1)
        shares = [[t.weights[group].get(name, 0.0) for t in tokens] for name in trace.members]
        axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
        axes.set_yticks(range(len(trace.members)), trace.members, fontsize=8, parse_math=False)
        labels = [_shown(token.token).replace(" ", "␣").strip() for token in tokens]
        axes.set_xticks(range(len(tokens)), labels, fontsize=7, rotation=90, parse_math=False)
        axes.axvline(len(tokens) - answer - 0.5, color="#0072b2", linewidth=1.5)
        axes.set_title(group, fontsize=9)
    data = BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _answer(trace: GateTrace) -> tuple[TokenGates, ...]:
    return trace.answers[0] if trace.answers else ()


def _colours(trace: GateTrace) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(trace.members)}


def _largest(weights: Mapping[str, float]) -> str | None:
    """None: the base model alone."""
    return max(weights, key=lambda name: weights[name], default=None)


def _style(weights: Mapping[str, float], colour: Mapping[str, str]) -> str:
    name = _largest(weights)
    if name is None:
        return ""
    return f"{'bold ' if weights[name] >= SURE else ''}black on {colour[name]}"


def _runs(tokens: Sequence[TokenGates], group: str) -> Iterator[str]:
    for name, run in groupby(tokens, lambda token: _largest(token.weights[group])):
        text = "".join(_shown(token.token) for token in run).replace("\n", " ")
        yield f"[{name or 'base'}] {text}"


def _shares(tokens: Sequence[TokenGates], group: str) -> dict[str, float]:
    total: Counter[str] = Counter()
    for token in tokens:
        total.update(dict(token.weights[group]))
    return {name: weight / len(tokens) for name, weight in total.items()}


def _span(token: TokenGates, group: str, colour: Mapping[str, str]) -> str:
    weights = token.weights[group]
    name = _largest(weights)
    told = ", ".join(f"{one} {weight:.2f}" for one, weight in weights.items()) or "base"
    shade = "" if name is None else f"background:{colour[name]}{round(255 * weights[name]):02x}"
    return f'<span style="{shade}" title="{escape(told)}">{escape(_shown(token.token))}</span>'


def _shown(token: str) -> str:
    """Line breaks visible, other marks that move a terminal's cursor replaced."""
    text = token.replace("\n", "⏎\n").replace("\t", "⇥")
    return "".join(c if c == "\n" or c.isprintable() else "�" for c in text)
