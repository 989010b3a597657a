"""The picture: rank correlation with the truth against the price of a score, a panel for each budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agents.plot import BLUE, GREEN, GREY, ORANGE
from benchmarks.lasting.candidates import KINDS, Candidate
from benchmarks.lasting.ranking import Estimate

VERMILION = "#D55E00"
LOOKS = dict(zip(KINDS, ((GREY, "v"), (GREEN, "D"), (BLUE, "s"), (ORANGE, "o"), (VERMILION, "*")), strict=True))
"""Kind of score -> colour (Okabe and Ito's) and marker, so that no kind is known by its colour alone."""
FREE = 1e-3
"""CPU seconds at which scores stand that cost less."""

Taus = Mapping[float, Sequence[tuple[Candidate, Estimate]]]


def figure(
    title: str,
    taus: Taus,
    *,
    fronts: Mapping[float, Sequence[str]],
    ceilings: Mapping[float, float | None],
    tests: Mapping[float, float],
) -> Figure:
    """All scores, their intervals, and numbers, with names, at those that no cheaper one beats.

    Args:
        title: The takeaway.
        taus: Budget -> every candidate with its tau.
        fronts: Budget -> the candidates to name, from cheap to dear.
        ceilings: Budget -> tau that the noise of one seed leaves a perfect score, where it is known.
        tests: Budget -> tau of the same fine-tuned networks' accuracy on the test split.
    """
    drawn = Figure(figsize=(max(1.6 + 5.4 * len(taus), 9.0), 5.4), layout="constrained", facecolor="white")
    axes = drawn.subplots(1, len(taus), sharey=True, squeeze=False)[0]
    for panel, (budget, some) in zip(axes, taus.items(), strict=True):
        _panel(panel, some, front=fronts[budget])
        for level, line, label in (
            (ceilings[budget], "--", "all that the noise of one seed leaves"),
            (tests[budget], ":", "the same fine-tuned networks on the test split"),
        ):
            if level is not None:
                panel.axhline(level, color="black", linestyle=line, linewidth=1, label=label)
        panel.set_title(f"{budget:g} of the macs", fontsize=10)
    axes[0].set_ylabel("Kendall's tau-b with accuracy after fine-tuning (95 % interval)")
    handles: dict[str, Artist] = {}
    for panel in axes:
        found, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    drawn.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    drawn.suptitle(title, fontsize=11)
    return drawn


def _panel(axes: Axes, some: Sequence[tuple[Candidate, Estimate]], *, front: Sequence[str]) -> None:
    axes.axhline(0, color=GREY, linewidth=0.6)
    at = {one.name: (max(one.cpu_s, FREE), tau) for one, tau in some}
    for kind, (colour, marker) in LOOKS.items():
        of_kind = [at[one.name] for one, _ in some if one.kind == kind]
        if of_kind:
            x, y = [x for x, _ in of_kind], [tau.value for _, tau in of_kind]
            size = 70 if marker == "*" else 22
            axes.scatter(x, y, color=colour, marker=marker, s=size, alpha=0.75, linewidths=0, label=kind, zorder=3)
    best = [at[name] for name in front]
    x, y = [x for x, _ in best], [tau.value for _, tau in best]
    ends = [[max(tau.value - tau.low, 0) for _, tau in best], [max(tau.high - tau.value, 0) for _, tau in best]]
    axes.errorbar(x, y, yerr=ends, fmt="none", ecolor="#444444", elinewidth=0.8, capsize=2, zorder=2)
    axes.step(x, y, where="post", color="#444444", linewidth=0.8, zorder=1)
    for number, place in enumerate(zip(x, y, strict=True)):
        look = {"fontsize": 8, "fontweight": "bold", "zorder": 5}
        axes.annotate(str(number + 1), place, xytext=(5, 4), textcoords="offset points", **look)
    # Names beside the points would cover each other: the frontier is steep where scores cost about the same.
    key = "\n".join(f"{number + 1}  {name}, {y[number]:.2f}" for number, name in enumerate(front))
    box = {"facecolor": "white", "edgecolor": "#cccccc", "alpha": 0.85, "pad": 3}
    axes.text(
        0.98, 0.02, key, transform=axes.transAxes, ha="right", va="bottom", ma="left", fontsize=7, bbox=box, zorder=6
    )
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set(xlabel=f"CPU seconds for one plan, one thread (those below {FREE:g} stand there)", ylim=(-1.05, 1.05))
    axes.grid(color="#eeeeee", linewidth=0.6)
