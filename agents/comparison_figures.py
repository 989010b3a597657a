"""The figures of a comparison. Drawn once: as SVG whose ink follows the page's theme, and as pictures for TensorBoard.

Colours of kinds are Okabe and Ito's, safe for colour-blind eyes; each kind has a marker of its own, too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from agents.comparison_methods import DENSE
from agents.comparison_summary import BEFORE, COSTS, Summary, front, score

if TYPE_CHECKING:  # older versions of matplotlib do not have it
    from matplotlib.typing import RcKeyType

INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6471", "#d9dde2", "#fefefe"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
"""Colours that the page's theme replaces."""

KINDS = {
    "heuristic": ("#8a8f98", "o", "heuristic"),
    "paper": ("#E69F00", "s", "published method"),
    "search": ("#3c9bd6", "^", "search"),
    "learned": ("#D55E00", "D", "learned"),
    "runtime": ("#009E73", "P", "runtime (mean macs over images)"),
}
"""Kind -> colour, marker, and what legends call it."""

MAP = "cividis"
"""Colour map of shares: rises in lightness, and looks the same to colour-blind eyes."""

STYLE: dict[RcKeyType, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "comparison",
    "savefig.facecolor": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure and what it says.

    Attributes:
        name: For TensorBoard and file names.
        title: The takeaway, computed from the data.
        note: How to read it.
        figure: The picture.
    """

    name: str
    title: str
    note: str
    figure: Figure

    @property
    def svg(self) -> str:
        """The picture for a page, in the page's colours."""
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with mpl.rc_context(STYLE):
            self.figure.savefig(stream, format="svg", metadata=nothing)
        text = stream.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # identifiers of several pictures on one page must differ
        text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        for colour, variable in THEME.items():
            text = text.replace(colour, variable)
        return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img" class="figure"', text, count=1)

    @property
    def png(self) -> bytes:
        """The picture on paper."""
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi=110, facecolor="white", metadata={"Software": None})
        return stream.getvalue()


def tradeoff(rows: Sequence[Summary], dense: Summary | None) -> Figure:
    """Accuracy against macs, params and latency as shares of the dense network's, with the front of static rows."""
    figure = _figure(11.0, 4.6)
    panels, fronts = figure.subplots(1, 3, sharey=True), []
    for axes, cost in zip(panels, COSTS, strict=True):
        points = []
        for row in rows:
            name = "dynamic_macs_share" if cost == "macs" and row.dynamic else f"{cost}_share"
            x, y = row.mean(name), row.mean(score(row))
            if x is None or y is None:
                continue
            colour, marker, _ = KINDS[row.kind]
            half = row.half(score(row)) or 0.0
            axes.plot([x, x], [y - half, min(y + half, 1.0)], color=colour, linewidth=1.2, alpha=0.45, zorder=2)
            face = "none" if row.dynamic else colour
            axes.plot(x, y, marker, color=colour, markerfacecolor=face, markersize=7, markeredgewidth=1.4, zorder=3)
            if not row.dynamic:
                points.append((x, y, row.method))
        kept = [points[i] for i in front([point[:2] for point in points])]
        axes.plot([p[0] for p in kept], [p[1] for p in kept], color=INK, linewidth=1.3, zorder=1)
        fronts.append(kept)
        if dense is not None:
            axes.axhline(dense.mean(BEFORE), color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
        axes.set_xlabel(f"{cost}, share of dense")
        axes.set_xlim(left=0, right=1.08 * max([axes.get_xlim()[1], *(point[0] for point in points)]))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _percent(axes.yaxis)
        _percent(axes.xaxis)
        axes.grid(linewidth=0.6)
    panels[0].set_ylabel("test accuracy")
    _zoom(panels[0], [value for row in rows if (value := row.mean(score(row))) is not None], dense)
    for axes, kept in zip(panels, fronts, strict=True):
        _label(axes, kept)
    _legend(figure, rows, extra=[("front of the static rows", INK, "-"), ("dense network", MUTED, "--")])
    return figure


def by_method(rows: Sequence[Summary], dense: Summary | None, order: Sequence[str]) -> Figure:
    """A panel a budget: each method's accuracy before (hollow) and after (filled) fine-tuning, with intervals."""
    budgets = sorted({row.budget for row in rows}, reverse=True)
    figure = _figure(11.0, 1.9 + 0.34 * len(order))
    panels = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        for row in (row for row in rows if row.budget == budget):
            at, colour, marker = order.index(row.method), *KINDS[row.kind][:2]
            before, after = row.mean(BEFORE), row.mean(score(row)) or 0.0
            half = row.half(score(row)) or 0.0
            axes.plot([after - half, min(after + half, 1.0)], [at, at], color=colour, linewidth=5, alpha=0.35, zorder=2)
            if score(row) != BEFORE:
                axes.plot([before, after], [at, at], color=colour, linewidth=1.0, zorder=2)
                axes.plot(before, at, marker, color=colour, markerfacecolor=PAPER, markersize=7, zorder=3)
            axes.plot(after, at, marker, color=colour, markersize=7.5, zorder=4)
        if dense is not None:
            axes.axvline(dense.mean(BEFORE), color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
        axes.set_title(aim_of(rows[0], budget), loc="left")
        axes.set_xlabel("test accuracy")
        axes.grid(axis="x", linewidth=0.6)
        axes.set_yticks(range(len(order)), order)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        _percent(axes.xaxis)
    panels[0].set_ylim(len(order) - 0.4, -0.6)
    tuned = any(score(row) != BEFORE for row in rows)
    _legend(figure, rows, extra=[("dense network", MUTED, "--")], hollow="before fine-tuning" if tuned else None)
    return figure


def profiles(rows: Sequence[Summary], order: Sequence[str]) -> Figure:
    """Share of channels that each static method keeps in each group at one budget, means over seeds, as a heat map."""
    rows = sorted((row for row in rows if not row.dynamic), key=lambda row: order.index(row.method))
    groups = list(rows[0].records[0]["kept"])
    shares = np.array([[kept_share(row, group) for group in groups] for row in rows])
    few = len(groups) <= 16
    figure = _figure(11.0, 2.0 + 0.34 * len(rows))
    axes = figure.subplots()
    image = axes.pcolormesh(shares, cmap=MAP, vmin=0, vmax=1)
    axes.invert_yaxis()
    for (i, j), share in np.ndenumerate(shares) if few else ():
        ink = "#ffffff" if share < 0.45 else "#101010"
        axes.text(j + 0.5, i + 0.5, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=9.5)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [row.method for row in rows])
    axes.set_xticks(np.arange(len(groups)) + 0.5, groups, rotation=35 if few else 90, ha="right" if few else "center")
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("group of channels, in forward order")
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=14)
    bar.set_label("channels kept, %")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    bar.outline.set_visible(False)
    return figure


def costs(rows: Sequence[Summary], order: Sequence[str]) -> Figure:
    """CPU seconds that each method needs to find its plan, on a logarithmic scale, and the networks it measures."""
    figure = _figure(11.0, 1.3 + 0.34 * len(order))
    axes = figure.subplots()
    for at, method in enumerate(order):
        some = [row for row in rows if row.method == method]
        seconds = [value for row in some for value in row.values("find")]
        colour, marker, _ = KINDS[some[0].kind]
        spent = sorted({int(value) for row in some for value in row.values("evaluations")})
        text = f"{'-'.join(str(n) for n in (spent[:1] + spent[-1:] if len(spent) > 1 else spent))} evaluations"
        if not seconds:
            continue
        mean = float(np.mean(seconds))
        axes.plot([min(seconds), max(seconds)], [at, at], color=colour, linewidth=5, alpha=0.35)
        axes.plot(mean, at, marker, color=colour, markersize=7.5)
        said = f"{_seconds(mean)}, {text}"
        axes.annotate(said, (max(seconds), at), (9, 0), textcoords="offset points", va="center", color=MUTED)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.35)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(order)), order)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlabel("CPU time to find the plan (mean; bar: least and most of all seeds and budgets)")
    axes.grid(axis="x", linewidth=0.6)
    return figure


def spreads(rows: Sequence[Summary]) -> Figure:
    """Macs of single images under runtime methods: 5th to 95th percentile around the mean, shares of dense."""
    rows = [row for row in rows if row.dynamic]
    figure = _figure(11.0, 1.6 + 0.4 * len(rows))
    axes = figure.subplots()
    colour, marker, _ = KINDS["runtime"]
    for at, row in enumerate(rows):
        low, high = (row.mean(f"dynamic_macs_share_{p}") or 0.0 for p in ("5", "95"))
        axes.plot([low, high], [at, at], color=colour, linewidth=6, alpha=0.4)
        axes.plot(row.mean("dynamic_macs_share") or 0.0, at, marker, color=colour, markersize=8)
        if row.budget <= 1:
            axes.plot([row.budget] * 2, [at - 0.35, at + 0.35], color=INK, linewidth=1.6)
    axes.set_yticks(range(len(rows)), [f"{row.method}, {aim_of(row, row.budget)}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlabel("macs of an image, share of the dense network's (bar: 5-95 % of test images, black: budget)")
    axes.grid(axis="x", linewidth=0.6)
    _percent(axes.xaxis)
    return figure


def kept_share(row: Summary, group: str) -> float:
    """Share of a group's channels that is kept, mean over seeds."""
    pairs = [record["kept"][group] for record in row.records]
    return float(np.mean([kept / channels for kept, channels in pairs]))


def aim_of(row: Summary, budget: float) -> str:
    """A budget in words."""
    resource = row.records[0]["protocol"]["budget_resource"]
    return f"{100 * budget:.3g} % of the {resource}" if budget <= 1 else f"{budget:,.0f} {resource}"


def _seconds(value: float) -> str:
    if value >= 3600:
        return f"{value / 3600:.3g} h"
    return f"{value / 60:.3g} min" if value >= 60 else f"{value:.2g} s"


PLACES = [(side * 8, height) for height in (6, -14, 20, -28, 34, -42, 48) for side in (-1, 1)]
"""Where a name may stand beside its point, in order of preference: offsets in points, to the left below 0."""


def _label(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names of points, each at the first place where it covers no other name and no point, and stays in the panel."""
    scale = axes.figure.dpi / 72
    at = (axes.transData.transform([point[:2] for point in points]).reshape(-1, 2) / scale).tolist()
    panel = axes.get_window_extent().get_points() / scale
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for (x, y), (_, _, name) in zip(at, points, strict=True):
        boxes = [(place, _box(x, y, place, name)) for place in PLACES]
        free = [one for one in boxes if _inside(one[1], panel) and not any(_overlap(one[1], other) for other in taken)]
        place, box = (free or boxes)[0]
        taken.append(box)
        side = "right" if place[0] < 0 else "left"
        axes.annotate(
            name,
            points[len(taken) - len(points) - 1][:2],
            place,
            textcoords="offset points",
            ha=side,
            fontsize=9,
            color=INK,
            zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground=PAPER)],
        )


Box = tuple[float, float, float, float]


def _box(x: float, y: float, place: tuple[int, int], name: str) -> Box:
    """Left, bottom, right and top of a name, in points; letters of this size are 5.6 points wide at most."""
    width, left = 5.6 * len(name), x + place[0]
    left -= width if place[0] < 0 else 0
    return left, y + place[1] - 2, left + width, y + place[1] + 9


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _inside(box: Box, panel: np.ndarray) -> bool:
    return bool(panel[0, 0] <= box[0] and box[2] <= panel[1, 0] and panel[0, 1] <= box[1] and box[3] <= panel[1, 1])


def _zoom(axes: Axes, values: Sequence[float], dense: Summary | None) -> None:
    """Room for all means; whiskers may leave the picture."""
    values = [*values, *([] if dense is None else [dense.mean(BEFORE) or 1.0])]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = max(high - low, 0.02)
    axes.set_ylim(low - 0.12 * room, min(high + 0.2 * room, 1.04))


def _percent(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _legend(
    figure: Figure,
    rows: Sequence[Summary],
    *,
    extra: Sequence[tuple[str, str, Literal["-", "--"]]],
    hollow: str | None = None,
) -> None:
    """One legend below all panels."""
    handles = []
    kinds: Mapping[str, None] = dict.fromkeys(row.kind for row in rows if row.method != DENSE)
    for kind, (colour, marker, name) in KINDS.items():
        if kind in kinds:
            face = "none" if kind == "runtime" and hollow is None else colour
            handles.append(Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle="", label=name))
    if hollow is not None:
        handles.append(Line2D([], [], color=MUTED, marker="o", markerfacecolor=PAPER, linestyle="", label=hollow))
    handles += [Line2D([], [], color=colour, linestyle=style, label=name) for name, colour, style in extra]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
