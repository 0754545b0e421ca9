"""The report's figures, as PNG bytes that depend on the numbers alone (no clock, no user's matplotlib settings).

Each figure is drawn for a light and for a dark page. Models are told apart by colour (Okabe and Ito's colour-blind-safe
palette), marker and line; the map of scores uses cividis and writes each number into its cell. Figures are narrow,
one axis each, so that they can be read on a telephone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.evaluation.summary import Tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")
Draw = Callable[["Axes", Theme], None]

PAGE = {"light": "#ffffff", "dark": "#16191d"}
INK = {"light": "#1f2328", "dark": "#e6e8eb"}
FAINT = {"light": "#d5d9de", "dark": "#3a4048"}
COLOURS = {
    "light": ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#8A6D00", "#555555"),
    "dark": ("#F0914A", "#56B4E9", "#2FC79A", "#E29CC4", "#F0E442", "#AAAAAA"),
}
MARKERS = "osD^vP"


def render(draw: Draw, theme: Theme, *, height_inches: float = 3.5) -> bytes:
    """Draw one axis on one page colour and return the PNG."""
    with _style(theme):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure: Figure = Figure(figsize=(5.8, height_inches), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot(), theme)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=160, metadata={"Software": None})
        return out.getvalue()


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    import matplotlib.style

    ink, faint = INK[theme], FAINT[theme]
    settings = {
        "font.size": 11,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": faint,
        "axes.axisbelow": True,
        "grid.color": faint,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "lines.linewidth": 2.0,
        "figure.facecolor": PAGE[theme],
        "axes.facecolor": PAGE[theme],
        "savefig.facecolor": PAGE[theme],
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    with matplotlib.style.context(["default", settings]):
        yield


def score_by_length(scores: Sequence[Tree], windows: Mapping[str, int], title: str) -> Draw:
    """Score over length (log2) of each model for one task, with its interval as a ribbon."""

    def draw(axis: Axes, theme: Theme) -> None:
        lengths = sorted({row["length_tokens"] for row in scores})
        for number, model in enumerate(windows):
            rows = sorted((row for row in scores if row["model"] == model), key=lambda row: row["length_tokens"])
            x = [math.log2(row["length_tokens"]) for row in rows]
            colour, marker = COLOURS[theme][number % 6], MARKERS[number % 6]
            axis.fill_between(
                x, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, alpha=0.22, linewidth=0
            )
            axis.plot(x, [row["mean"] for row in rows], color=colour, marker=marker, label=model, clip_on=False)
        _window_lines(axis, windows, theme, math.log2(lengths[0]), math.log2(lengths[-1]), math.log2)
        axis.set_ylim(0, 1)
        axis.set_xticks([math.log2(length) for length in lengths], [f"{length:,}" for length in lengths])
        _finish(axis, title, "length, tokens", "share of facts found")

    return draw


def loss_by_position(losses: Sequence[Tree], windows: Mapping[str, int], title: str) -> Draw:
    """Loss over position of each model, as steps between the bucket edges, with its interval as a ribbon."""
    edges = sorted({row[name] for row in losses for name in ("position_start", "position_end")})

    def place(position: float) -> float:
        # The first bucket begins at 0, which a logarithmic axis cannot show.
        return math.log2(max(position, edges[1] / 2))

    def draw(axis: Axes, theme: Theme) -> None:
        x = [place(edge) for edge in edges]
        for number, model in enumerate(windows):
            rows = sorted((row for row in losses if row["model"] == model), key=lambda row: row["position_start"])
            colour = COLOURS[theme][number % 6]
            low, high, mean = ([row[name] for row in rows] for name in ("low", "high", "mean"))
            axis.fill_between(x, [*low, low[-1]], [*high, high[-1]], step="post", color=colour, alpha=0.22, linewidth=0)
            axis.stairs(mean, x, baseline=None, color=colour, linewidth=2.0)
            middles = [(a + b) / 2 for a, b in pairwise(x)]
            axis.plot(middles, mean, MARKERS[number % 6], color=colour, label=model)
        _window_lines(axis, windows, theme, x[0], x[-1], place)
        axis.set_xticks(x, [f"{edge:,}" for edge in edges], rotation=30, ha="right", rotation_mode="anchor")
        _finish(axis, title, "position in the document, tokens", "loss, nats a token")

    return draw


def _window_lines(
    axis: Axes, windows: Mapping[str, int], theme: Theme, low: float, high: float, place: Callable[[float], float]
) -> None:
    axis.set_xlim(low - 0.12, high + 0.12)
    models: dict[int, list[tuple[int, str]]] = {}
    for number, (model, window) in enumerate(windows.items()):
        models.setdefault(window, []).append((number, model))
    for window, named in models.items():
        if not low <= place(window) <= high:
            continue
        colour = COLOURS[theme][named[0][0] % 6] if len(named) == 1 else INK[theme]
        axis.axvline(place(window), color=colour, linewidth=1.3, linestyle=(0, (4, 3)), zorder=1)
        axis.annotate(
            f"{' and '.join(model for _, model in named)}: {window:,}",
            (place(window), 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center" if place(window) < high - 0.6 else "right",
            va="bottom",
            fontsize=9,
            color=colour,
        )

    # An empty line names the dashed ones once.
    axis.plot([], [], color=INK[theme], linewidth=1.3, linestyle=(0, (4, 3)), label="trained window")


def _finish(axis: Axes, title: str, x_label: str, y_label: str) -> None:
    axis.grid(axis="y")
    axis.tick_params(length=0)
    axis.set_title(title, pad=22)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    if axis.get_legend_handles_labels()[0]:
        axis.figure.legend(loc="outside lower center", ncols=4)


def depth_map(cells: Sequence[Tree], window: int, title: str) -> Draw:
    """Score by length (columns) and depth (rows, the start of the text on top) of one model for one task."""
    lengths = sorted({cell["length_tokens"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})

    def draw(axis: Axes, theme: Theme) -> None:
        import numpy as np

        scores = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            scores[depths.index(cell["depth"]), lengths.index(cell["length_tokens"])] = cell["mean"]
        image = axis.imshow(scores, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (row, column), score in np.ndenumerate(scores):
            ink = "#ffffff" if score < 0.55 else "#16191d"
            axis.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=9.5, color=ink)
        inside = sum(length <= window for length in lengths)
        if 0 < inside < len(lengths):
            axis.axvline(inside - 0.5, color=INK[theme], linewidth=1.6, linestyle=(0, (4, 3)))
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.tick_params(length=0)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_title(title, pad=10)
        axis.set_xlabel("length, tokens")
        axis.set_ylabel("depth of the fact")
        colour_bar = axis.figure.colorbar(image, ax=axis, pad=0.02, aspect=28)
        colour_bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        colour_bar.ax.tick_params(length=0)

    return draw


def shares(breakdowns: Mapping[str, Mapping[str, float]], title: str) -> Draw:
    """One stacked bar for each breakdown, parts as shares of the whole, written into the parts that have room."""

    def draw(axis: Axes, theme: Theme) -> None:
        for row, parts in enumerate(breakdowns.values()):
            total, left = sum(parts.values()), 0.0
            for number, (name, value) in enumerate(parts.items()):
                share = value / total
                colour = COLOURS[theme][number % 6]
                axis.barh(row, share, left=left, color=colour, height=0.62, edgecolor=PAGE[theme], linewidth=1.5)
                text = f"{name}\n{share:.0%}"
                if max(map(len, text.split("\n"))) * 0.0145 < share:
                    ink = "#ffffff" if theme == "light" else "#16191d"
                    axis.text(left + share / 2, row, text, ha="center", va="center", fontsize=9, color=ink)
                left += share
        axis.set_yticks(range(len(breakdowns)), list(breakdowns))
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axis.tick_params(length=0)
        axis.set_title(title, pad=10)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)

    return draw


def training_curve(steps: Sequence[Mapping[str, Any]], number: int, title: str) -> Draw:
    """Loss by step: every step faintly, and the mean of each fortieth of them."""

    def draw(axis: Axes, theme: Theme) -> None:
        colour = COLOURS[theme][number % 6]
        x, y = ([float(step[name]) for step in steps] for name in ("step", "loss"))
        size = max(1, len(steps) // 40)
        if size > 1:
            axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.4)
        groups = [slice(first, first + size) for first in range(0, len(steps), size)]
        axis.plot(
            [sum(x[group]) / len(x[group]) for group in groups],
            [sum(y[group]) / len(y[group]) for group in groups],
            color=colour,
        )
        axis.set_ylim(bottom=0)
        _finish(axis, title, "step", "training loss, nats a token")

    return draw
