"""The report's plots: SVG text whose colours are the page's own variables, so that light, dark and print all fit.

Curves differ by marker and dash, bars by hatch: none needs its colour. Matplotlib draws; this knows figures only.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from kvbuy.figures import LayerRatio, Row

# Stand for the page's variables while matplotlib draws; no drawing of ours uses these colours for anything else.
COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--muted)",
    "#010205": "var(--rule)",
    "#010206": "var(--one)",
    "#010207": "var(--two)",
    "#010208": "var(--three)",
}
INK, MUTED, RULE, ONE, TWO, THREE = COLOURS
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud and searched
    "svg.hashsalt": "kvbuy",  # the same figures give the same bytes
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": RULE,
    "legend.frameon": False,
    "hatch.linewidth": 1.0,
}


def plot_lengths(rows: Sequence[Row]) -> str:
    """Prefill and reuse, in seconds, against the document's length."""

    def draw(axes: Axes) -> None:
        tokens = [row.tokens for row in rows]
        axes.plot(tokens, [row.prefill_seconds for row in rows], color=ONE, marker="o", label="prefill, in blocks")
        single = [row.single_pass_seconds for row in rows]
        axes.plot(tokens, single, color=ONE, marker="x", linestyle=":", label="prefill, one pass")
        axes.plot(tokens, [row.reuse_seconds for row in rows], color=TWO, marker="s", linestyle="--", label="reuse")
        axes.set(xscale="log", yscale="log", xlabel="tokens of the document", ylabel="seconds")
        axes.set_xticks(tokens, [str(count) for count in tokens])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y")
        axes.legend()

    return _svg(draw, height=3.8)


def plot_first_token(rows: Sequence[Row]) -> str:
    """What the time to the first token is made of, load and the prompt's rows, and one step more, in milliseconds."""

    def draw(axes: Axes) -> None:
        parts = (
            ("load", [row.load_seconds for row in rows], ONE, ""),
            ("the prompt's rows", [row.first_token_seconds for row in rows], TWO, "///"),
            ("one decode step", [row.decode_seconds for row in rows], THREE, "..."),
        )
        names = [str(row.tokens) for row in rows]
        left = [0.0] * len(rows)
        for label, seconds, colour, hatch in parts:
            widths = [1000 * one for one in seconds]
            solid = colour if not hatch else "none"
            axes.barh(names, widths, left=left, color=solid, edgecolor=colour, hatch=hatch, label=label, height=0.6)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set(xlabel="milliseconds", ylabel="tokens of the document")
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.figure.legend(loc="outside upper center", ncols=3)

    return _svg(draw, height=1.6 + 0.42 * len(rows))


def plot_layers(layers: Sequence[LayerRatio]) -> str:
    """What a codec leaves of each layer's keys and values."""

    def draw(axes: Axes) -> None:
        numbers = [layer.layer for layer in layers]
        axes.plot(numbers, [layer.key_ratio for layer in layers], color=ONE, marker="o", label="keys")
        axes.plot(
            numbers, [layer.value_ratio for layer in layers], color=TWO, marker="s", linestyle="--", label="values"
        )
        axes.set(xlabel="layer", ylabel="size / size as computed")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend()

    return _svg(draw, height=3.2)


def _svg(draw: Callable[[Axes], None], *, height: float) -> str:
    """What `draw` puts onto axes, as an SVG element of the page."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, height), layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for sentinel, variable in COLOURS.items():
        drawn = drawn.replace(sentinel, variable)
    return drawn.replace("font: 11px 'sans-serif'", "font: 11px sans-serif")
