"""Pictures that make the points of the papers that train, from the cells of `benchmarks.trained_papers`.

    python -m benchmarks.paper_pictures --task cifar10-resnet20 --weights FILE.safetensors --runs DIR --out DIR

The options are those of the table; pictures are of its first seed. What the table has trained is read; what it
has not is trained now, in the same folder.

| picture | shows |
|---|---|
| scales | BatchNorm scales under polarization, under plain L1, and of the dense network |
| betas | SCOP's scales of real against control features, kept and cut channels apart |
| sparsity | zeros and accuracy over the training: gRDA against the same SGD without a threshold |
| gates | share of open gates per layer of channel gating, and where they open in a few test images |
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from agents.cli import guarded, parse, stages
from agents.plot import BLUE, GREY, ORANGE, png
from baselines import channel_gating
from baselines.channel_gating_layers import ChannelGatedNetwork
from baselines.polarization_scales import LIMIT, gathered, sites
from baselines.scop_learning import Settings as ScopSettings
from baselines.scop_learning import Source, learned
from benchmarks.trained_cells import Bench, Record, preparing
from benchmarks.trained_papers import Cell, Settings, made
from prune_env.checks import check_name
from prune_env.files import write
from prune_env.pruning.measure import evaluating
from prune_env.pruning.plan import Plan
from prune_env.pruning.tracing import trace
from prune_env.tasks.images import Split

Array = np.ndarray

PREFIX = "papers_"
"""Of the pictures' files."""
SHOWN = 4
"""Test images in the picture of gates: the first of so many classes."""


@dataclass(frozen=True)
class PictureSettings(Settings):
    """Pictures of the papers that train."""

    pictures: tuple[str, ...] = ("scales", "betas", "sparsity", "gates")
    """Which to draw."""
    out: Path = Path("docs")
    """Folder of the pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.pictures:
            check_name("picture", name, PICTURES)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def scales(bench: Bench) -> dict[str, Float[Array, " scale"]]:
    """Row -> |gamma| of all channels that can be pruned, after its preparation."""
    graph = trace(bench.task.network, bench.task.example)
    networks = {
        "dense": bench.task.network,
        **{row: bench.prepared(row).network for row in ("polarization", "slimming")},
    }
    return {row: gathered(network, sites(network, graph)).abs().double().numpy() for row, network in networks.items()}


def betas(bench: Bench, plan: Plan) -> dict[str, Float[Array, " channel"]]:
    """`kept` and `cut` -> SCOP's beta in every layer that writes such a channel.

    Args:
        bench: The task.
        plan: What was kept.
    """
    task, graph = bench.task, trace(bench.task.network, bench.task.example)
    source = Source(task.train, task.data, bench.seed, task, bench.progress)
    controlled = learned(task.network, graph, source, ScopSettings(epochs=preparing("scop", bench.epochs)))
    beta = {
        name: one.beta.detach().double().numpy()
        for name, one in zip(controlled.writers, controlled.selections, strict=True)
    }
    found: dict[str, list[Array]] = {"kept": [], "cut": []}
    for group in graph.groups:
        stays = np.isin(np.arange(group.channels), plan.keep.get(group.name, range(group.channels)))
        for slot in group.producers:
            own, kept = beta[slot.module][slot.index], stays[slot.unit]
            found["kept"].append(own[kept])
            found["cut"].append(own[~kept])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def first_of_classes(split: Split) -> Tensor:
    """Positions of the first image of each of the first classes."""
    found = [int((split.labels == label).nonzero()[0]) for label in split.labels.unique()[:SHOWN]]
    return torch.tensor(found)


@torch.inference_mode()
def open_maps(gated: ChannelGatedNetwork, images: Float[Tensor, "image ..."]) -> dict[str, Float[Array, "image h w"]]:
    """Layer -> share of its channels whose gates are open at each position, for first, middle and last gated layer."""
    chosen = sorted({0, len(gated.names) // 2, len(gated.names) - 1})
    seen: dict[str, Array] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, gates: seen.update({name: gates.float().mean(1).numpy()})

    handles = [gated.layers[at].gate.register_forward_hook(note(gated.names[at])) for at in chosen]
    try:
        with evaluating(gated):
            gated(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# --- pictures --------------------------------------------------------------------------------------------------------


def scales_figure(task: str, found: Mapping[str, Float[Array, " scale"]]) -> Figure:
    """One histogram of |gamma| above the other.

    Args:
        task: Its name.
        found: Row -> scales; dense, slimming and polarization.
    """
    between = {
        row: (float((own < LOW).mean()), float(((own >= LOW) & (own < HIGH)).mean())) for row, own in found.items()
    }
    names = {"polarization": ("polarization", BLUE), "slimming": ("plain L1", ORANGE), "dense": ("dense network", GREY)}
    drawn = _figure(height=5.4)
    panels = drawn.subplots(len(names), 1, sharex=True)
    edges = np.linspace(0, max(1.0, *(float(own.max()) for own in found.values())), 61)
    for axes, (row, (name, colour)) in zip(panels, names.items(), strict=True):
        axes.hist(found[row], bins=edges, color=colour)
        axes.axvspan(LOW, HIGH, color=GREY, alpha=0.15, linewidth=0)
        axes.set_ylabel("scales")
        below, valley = between[row]
        label = f"{name}: {below:.0%} below {LOW:g}, {valley:.0%} in the shaded valley"
        axes.set_title(label, fontsize=9, loc="left")
    panels[-1].set_xlabel("|gamma| of channels that can be pruned, before the cut")
    polar, slim = between["polarization"], between["slimming"]
    _title(
        drawn,
        f"{task}: {polar[0]:.0%} of the scales near 0 and {polar[1]:.0%} in the valley under polarization, "
        f"{slim[0]:.0%} and {slim[1]:.0%} under L1",
    )
    return drawn


def betas_figure(task: str, budget: str, found: Mapping[str, Float[Array, " channel"]]) -> Figure:
    """Kept and cut channels by their scale of real features.

    Args:
        task: Its name.
        budget: Share of the macs that is kept.
        found: From `betas`.
    """
    every = np.concatenate([*found.values()])
    drawn = _figure(height=3.6)
    axes = drawn.subplots()
    edges = np.linspace(0, 1, 41)
    axes.hist([found["kept"], found["cut"]], bins=edges, stacked=True, color=[BLUE, ORANGE], label=["kept", "cut"])
    axes.axvline(0.5, color="black", linestyle="--", linewidth=1)
    axes.annotate("real and control features alike", (0.5, 1), xycoords=("data", "axes fraction"), xytext=(4, -11),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(
        xlabel="beta, scale of the real features (1: real alone, 0: those of other images alone)", ylabel="channels"
    )
    axes.margins(y=0.15)
    axes.legend(frameon=False, title=f"at {budget} of the macs", loc="upper left")
    lost = float((found["cut"] > 0.5).mean()) if len(found["cut"]) else 0.0
    _title(
        drawn,
        f"{task}: {float((every > 0.5).mean()):.0%} of {len(every)} channels prefer their real features; "
        f"of those that are cut, {lost:.0%} do",
    )
    return drawn


def sparsity_figure(task: str, grda: Record, sgd: Record) -> Figure:
    """Zeros and accuracy by epoch.

    Args:
        task: Its name.
        grda: Record of its cell.
        sgd: Record of the same steps without a threshold.
    """
    drawn = _figure(height=4.8)
    zeros, accuracy = drawn.subplots(2, 1, sharex=True)
    for record, name, colour, style in ((grda, "gRDA", BLUE, "-"), (sgd, "SGD", ORANGE, "--")):
        epochs = [0, *(row["epoch"] for row in record["by_epoch"])]
        zeros.plot(epochs, [0, *(100 * row["sparsity"] for row in record["by_epoch"])], style, color=colour, label=name)
        searched = [record["dense"]["search"], *(row["search"] for row in record["by_epoch"])]
        accuracy.plot(epochs, [100 * value for value in searched], style, color=colour, label=name)
    zeros.set(ylabel="parameters at zero, %")
    accuracy.set(ylabel="search accuracy, %", xlabel="epochs from the trained network")
    zeros.legend(frameon=False)
    last = grda["by_epoch"][-1]
    gap = 100 * (last["search"] - sgd["by_epoch"][-1]["search"])
    _title(
        drawn,
        f"{task}: {last['sparsity']:.0%} of the parameters are zero after {last['epoch']} epochs of gRDA, "
        f"{gap:+.2f} points against SGD on the search split",
    )
    return drawn


def gates_figure(
    task: str,
    records: Sequence[Record],
    pixels: Float[Array, "image h w c"],
    maps: Mapping[str, Float[Array, "image h w"]],
) -> Figure:
    """Open gates by layer for each target threshold, and where they open for the first of them.

    Args:
        task: Its name.
        records: Cells of channel gating.
        pixels: Test images in [0, 1].
        maps: From `open_maps`.
    """
    drawn = _figure(width=10.4, height=5.0)
    left, right = drawn.subfigures(1, 2, width_ratios=[1.0, 1.25])
    axes, layers = left.subplots(), records[0]["layers"]
    height = 0.8 / len(records)
    for number, (record, colour) in enumerate(zip(records, (BLUE, ORANGE, GREY), strict=False)):
        shares = [100 * share for share in record["test"]["open_gates"]]
        axes.barh(np.arange(len(layers)) + number * height, shares, height, color=colour, label=f"T = {record['aim']}")
    axes.set(xlabel="open gates, % (test images)", yticks=np.arange(len(layers)) + 0.4 - height / 2, yticklabels=layers)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    grid = right.subplots(len(pixels), 1 + len(maps), squeeze=False)
    grey, most_open = pixels.mean(3), max(float(own.max()) for own in maps.values())
    frame = (0, grey.shape[2], grey.shape[1], 0)
    for row, image in enumerate(pixels):
        grid[row, 0].imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, extent=frame)
        for column, (name, own) in enumerate(maps.items(), start=1):
            grid[row, column].imshow(grey[row], cmap="gray", vmin=0, vmax=1, extent=frame)
            shade = grid[row, column].imshow(own[row], cmap="viridis", vmin=0, vmax=most_open, alpha=0.7, extent=frame)
            grid[0, column].set_title(name, fontsize=8)
    for each in grid.flat:
        each.set(xticks=[], yticks=[])
    grid[0, 0].set_title("test image", fontsize=8)
    right.colorbar(shade, ax=grid, label=f"share of channels open, T = {records[0]['aim']}", shrink=0.8)
    first = records[0]["test"]
    most, least = (int(pick(first["open_gates"])) for pick in (np.argmax, np.argmin))
    _title(
        drawn,
        f"{task}: T = {records[0]['aim']} costs {first['dynamic_macs_share']:.0%} of the macs; most gates are open in "
        f"{layers[most]} ({first['open_gates'][most]:.0%}), fewest in {layers[least]} "
        f"({first['open_gates'][least]:.0%})",
        columns=128,
    )
    return drawn


LOW, HIGH = 0.05, LIMIT
"""The valley between the poles that the first picture measures; above its end the authors' code warns."""


def _title(drawn: Figure, text: str, *, columns: int = 76) -> None:
    """The takeaway, over as many lines as it needs."""
    drawn.suptitle(textwrap.fill(text, columns), fontsize=10)


def _figure(*, width: float = 6.4, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


# --- from the cells --------------------------------------------------------------------------------------------------

On = Callable[[int], Bench]


def _scales(settings: PictureSettings, on: On) -> Figure:
    return scales_figure(settings.task, scales(on(settings.seeds[0])))


def _betas(settings: PictureSettings, on: On) -> Figure:
    cell = Cell("scop", f"{settings.budgets[0]:g}", settings.seeds[0])
    made(settings, cell, on)
    plan = Plan.from_json((settings.folder(cell) / "plan.json").read_text())
    return betas_figure(settings.task, cell.aim, betas(on(cell.seed), plan))


def _sparsity(settings: PictureSettings, on: On) -> Figure:
    grda, sgd = (made(settings, Cell(row, "", settings.seeds[0]), on) for row in ("grda", "sgd"))
    return sparsity_figure(settings.task, grda, sgd)


def _gates(settings: PictureSettings, on: On) -> Figure:
    seed, bench = settings.seeds[0], on(settings.seeds[0])
    records = [made(settings, Cell("channel_gating", f"{target:g}", seed), on) for target in settings.targets]
    task, epochs = bench.task, settings.epochs
    chosen = channel_gating.scaled(task, target=float(records[0]["aim"]), epochs=epochs, seed=seed)
    gated = channel_gating.prepared(task, chosen, progress=bench.progress)
    positions = first_of_classes(task.test)
    pixels = task.test.pixels(positions)
    maps = open_maps(gated, task.test.normalise(pixels))
    return gates_figure(task.name, records, pixels.permute(0, 2, 3, 1).numpy() / 255, maps)


PICTURES: dict[str, Callable[[PictureSettings, On], Figure]] = {
    "scales": _scales,
    "betas": _betas,
    "sparsity": _sparsity,
    "gates": _gates,
}
"""Name -> (settings, seed -> its task) -> picture."""


def main(settings: PictureSettings) -> int:
    """Draw, and say where the pictures are."""
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    with stages(Console(stderr=True)) as tell:
        on = cache(lambda seed: settings.bench(seed, tell))
        for name in settings.pictures:
            file = settings.out / f"{PREFIX}{name}.png"
            write(file, png(PICTURES[name](settings, on)))
            sys.stdout.write(f"{file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(PictureSettings, sys.argv[1:], program="python -m benchmarks.paper_pictures"))))
