"""Pictures: a plan as bars per group, and a run's curve. Colours are Okabe and Ito's, safe for colour-blind eyes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agents.episode import Episode
from prune_env.envs.dynamics import Problem

BLUE, ORANGE, GREY, GREEN, SKY = "#0072B2", "#E69F00", "#999999", "#009E73", "#56B4E9"
SOURCES = {"policy": BLUE, "disturbed best": SKY, "surrogate": SKY, "random": GREY}
"""Colour of an episode's dot by where its actions came from; known plans are orange."""


def plan_figure(problem: Problem, learned: Sequence[int], uniform: Sequence[int]) -> Figure:
    """Share kept in each group: the learned plan as bars, the uniform plan as marks.

    Args:
        problem: Names the groups that are decided.
        learned: Channels kept per group of the graph.
        uniform: The same of the uniform plan.
    """
    names = [problem.graph.groups[step].name for step in problem.steps]
    whole = problem.graph.full[list(problem.steps)]
    bars, marks = (np.asarray(counts)[list(problem.steps)] / whole for counts in (learned, uniform))
    figure = _figure(width=max(6.0, 0.42 * len(names) + 2.0), height=3.8)
    axes = figure.add_subplot()
    at = np.arange(len(names))
    axes.bar(at, bars, width=0.72, color=BLUE, label="learned")
    axes.hlines(marks, at - 0.42, at + 0.42, color=ORANGE, linewidth=2.2, label="uniform")
    if len(names) <= 24:
        for x, share, count in zip(at, bars, np.asarray(learned)[list(problem.steps)], strict=True):
            axes.text(float(x), share + 0.015, str(count), ha="center", va="bottom", fontsize=7, color="#444444")
    axes.set_xticks(at, names, rotation=60, ha="right", fontsize=8)
    axes.set(ylim=(0, 1.12), ylabel="share of channels kept", title=f"{problem.name}: what is kept where")
    axes.legend(frameon=False, ncols=2, loc="upper right", fontsize=8)
    return figure


def learning_figure(
    problem: Problem, episodes: Sequence[Episode], rows: dict[str, dict], *, sources: dict[str, str] = SOURCES
) -> Figure:
    """Accuracy on the search split of every episode, the best so far, and the rows of the report as lines.

    Args:
        problem: Names the picture.
        episodes: In order.
        rows: Of the report.
        sources: Colour of an episode's dot by where its actions came from.
    """
    figure = _figure(width=7.5, height=3.8)
    axes = figure.add_subplot()
    groups = {name: [e for e in episodes if e.source == name] for name in sources}
    groups["known plans"] = [e for e in episodes if e.source not in sources]
    for name, some in {name: some for name, some in groups.items() if some}.items():
        colour = sources.get(name, ORANGE)
        axes.scatter([e.number for e in some], [e.accuracy for e in some], s=11, alpha=0.75, color=colour, label=name)
    ranks = [max(episodes[: i + 1], key=lambda e: e.rank).accuracy for i in range(len(episodes))]
    axes.step([e.number for e in episodes], ranks, where="post", color=GREEN, linewidth=1.8, label="best so far")
    for name, style in (("uniform", "--"), ("error_curves", "-."), ("random", ":")):
        if name in rows:
            axes.axhline(rows[name]["search_accuracy"], color=GREY, linestyle=style, linewidth=1.4, label=name)
    axes.set(xlabel="episode", ylabel="accuracy on the search split", title=f"{problem.name}: the search")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    return figure


def png(figure: Figure) -> bytes:
    """The picture's bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def _figure(*, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_facecolor("white")
    return figure
