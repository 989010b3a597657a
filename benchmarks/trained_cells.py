"""Cells of the table of papers that train: how each row is prepared, cut, fine-tuned and measured.

A row that cuts spends the total epochs twice: the published share of them prepares (training for pruning, over that and
fine-tuning), rounded, the rest fine-tunes. What a preparation or a fine-tuning has done is kept in the folder of the
runs after every epoch. All networks are cut and repaired alike: BatchNorm statistics on the same training images, no
refit. All are fine-tuned alike: the dense training's recipe at a peak of `LR`. Only the epochs differ.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import prune_env
from baselines import METHODS, channel_gating, directional_pruning, polarization, polarization_search, prune, scop
from baselines.method import Method
from prune_env.files import write
from prune_env.gates import LEARNING_RATE as LR
from prune_env.number_format import number_format
from prune_env.pruning import archive
from prune_env.pruning.measure import Meter
from prune_env.tasks.dense import usual_training
from prune_env.tasks.images import Split
from prune_env.tasks.task import Task
from prune_env.tasks.training import Hook, TrainingState, train
from prune_env.tasks.training.loop import Progress

Record = dict[str, Any]


@dataclass(frozen=True)
class CutRow:
    """A row whose networks are really cut.

    Attributes:
        method: Epochs of its preparation -> the method.
        prepares: Share of all epochs that prepares.
        own: Whether it decides by itself how much goes, so that it has a row without a budget.
        published: What was reported, in one line.
    """

    method: Callable[[int], Method]
    prepares: Fraction
    own: bool = False
    published: str = ""


def _regularised(method: Method, regulariser: str, table: Mapping[str, Any], epochs: int) -> Method:
    settings = partial(polarization.scaled, table=table, epochs=epochs)
    return dataclasses.replace(
        method, prepare=partial(polarization.prepare, settings=settings, regulariser=regulariser)
    )


def _polarized_to_half(epochs: int) -> Method:
    prepare = partial(polarization_search.prepare_for, budget=0.5, epochs=epochs)
    return dataclasses.replace(polarization.POLARIZATION, name="polarization_half", prepare=prepare)


def _scop(method: Method, epochs: int) -> Method:
    return scop.learning_by(method, scop.Settings(epochs=epochs))


def _directional(epochs: int) -> Method:
    return directional_pruning.directional("directional_pruning", directional_pruning.Structured(epochs=epochs))


POLARIZED = "ResNet-56: +.03, -1.17 points at 47, 71 % fewer macs (93.80); that rerun: -.73, -1.36 at 40, 60 %"
SCOP_SHARE = Fraction(20, 140)
"""20 epochs learn the scales, 120 fine-tune."""
CUTS: dict[str, CutRow] = {
    "uniform": CutRow(
        lambda epochs: METHODS["uniform"],
        Fraction(0),
        published="l1, ResNet-56, an independent rerun: -.18, -.94 points at 40, 60 % fewer macs (94.08)",
    ),
    "polarization": CutRow(
        partial(_regularised, polarization.POLARIZATION, "polarization", polarization.PAPER),
        Fraction(200, 400),
        own=True,
        published=POLARIZED,
    ),
    # the trials of the search are not among its epochs: only the last of them prepares
    "polarization_half": CutRow(
        _polarized_to_half,
        Fraction(200, 400),
        own=True,
        published=POLARIZED,
    ),
    "slimming": CutRow(
        partial(_regularised, polarization.SLIMMING, "slimming", polarization.SLIMMING_PAPER),
        Fraction(160, 320),
        published="ResNet-56, by polarization's authors: -.53, -2.60 points at 48, 68 % fewer macs (93.80)",
    ),
    "scop": CutRow(
        partial(_scop, scop.SCOP),
        SCOP_SHARE,
        published="ImageNet, ResNet-50: -.20, -.89 points at 45, 55 % fewer macs (76.15)",
    ),
    "scop_negative": CutRow(partial(_scop, scop.SCOP_NEGATIVE), SCOP_SHARE, own=True, published="extension: nothing"),
    "scop_fdr": CutRow(partial(_scop, scop.SCOP_FDR), SCOP_SHARE, own=True, published="extension: nothing"),
    "directional_pruning": CutRow(_directional, Fraction(1, 2), own=True, published="extension: nothing"),
    "channel_gating_surrogate": CutRow(
        channel_gating.surrogate_after, Fraction(1, 2), published="extension: nothing"
    ),
}  # fmt: skip
"""Row -> how it is made. Where nothing is published, half of the epochs prepares."""

SPARSE = {
    "grda": "WRN-28-10: +.33 points against sgd at 97 % zeros (94.17 -> 94.50)",
    "sgd": "gRDA's own baseline: no threshold, momentum or decay",
}
"""Row of unstructured pruning -> what was reported."""

GATED = {"channel_gating": "ImageNet, ResNet-18, quoted by others: 31.7 % error at 51 % fewer macs"}
"""Row whose macs are dynamic -> what was reported."""


def preparing(row: str, epochs: int) -> int:
    """Epochs of so many that prepare a row that cuts: its share, but at least one for each side."""
    share = CUTS[row].prepares
    return min(max(round(share * epochs), 1), epochs - 1) if share else 0


@dataclass(frozen=True, eq=False)
class Bench:
    """A task on which cells are made.

    Attributes:
        task: Its preparations are kept in the folder of the runs.
        epochs: Passes over the training split that every cell has in all.
        seed: Of splits and trainings.
        progress: Told about every step.
    """

    task: Task
    epochs: int
    seed: int
    progress: Progress | None = None

    def prepared(self, row: str) -> Task:
        """The task with the network that a row cuts: from the folder of the runs, or trained."""
        chosen = CUTS[row].method(preparing(row, self.epochs))
        return chosen.prepare(self.task, self.seed, self.progress)


def bench(
    name: str,
    *,
    weights: str | None,
    dense_epochs: int | None,
    epochs: int,
    seed: int,
    runs: Path,
    progress: Progress | None = None,
) -> Bench:
    """Make a task whose trainings leave what they made in the folder of the runs.

    Args:
        name: Of the task.
        weights: Of the dense network; None trains it.
        dense_epochs: Epochs of that training; None takes the data set's own.
        epochs: Passes that every cell has in all.
        seed: Of splits and trainings.
        runs: Folder of the runs.
        progress: Told about every step.
    """
    task = prune_env.make_task(name, weights=weights, epochs=dense_epochs, seed=seed, progress=progress)
    settings = {**task.settings, "root": str(runs.expanduser().resolve() / "trained")}
    return Bench(dataclasses.replace(task, settings=settings), epochs, seed, progress)


def accuracies(network: nn.Module, task: Task) -> Record:
    """Accuracy on the search and the test split."""
    return {name: _meter(network, split).accuracy_and_loss(network)[0] for name, split in _splits(task).items()}


def cut_cell(made: Bench, row: str, budget: float, folder: Path) -> Record:
    """Prepare, cut, fine-tune, and measure after each.

    Args:
        made: The task.
        row: A name in `CUTS`.
        budget: Share of the macs.
        folder: Of the cell: plan and network, and a checkpoint while it is fine-tuned.
    """
    task, epochs = made.task, preparing(row, made.epochs)
    prepared = made.prepared(row)
    method = CUTS[row].method(epochs)
    found = prune(method, task, budget=budget, refit=False, seed=made.seed, progress=made.progress)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "plan.json", found.plan.to_json())
    network = copy.deepcopy(found.network).requires_grad_(True)
    checkpoint = folder / "fine_tune.safetensors"
    settings = usual_training(task.data, task.network_name, seed=made.seed, epochs=made.epochs - epochs, lr=LR)
    train(network, task.train, settings=settings, progress=made.progress, checkpoint=checkpoint)
    if not (folder / "network").exists():
        archive.save(network, found.plan, folder / "network")
    dense = accuracies(task.network, task)
    record = {
        "prepare_epochs": epochs,
        "fine_tune_epochs": made.epochs - epochs,
        "macs_share": found.search.macs / prune_env.count_macs(task.network, task.example),
        "params_share": found.search.params / sum(p.numel() for p in task.network.parameters()),
        "counts": dict(found.counts),
        "dense": dense,
        "prepared": dense if prepared is task else accuracies(prepared.network, task),
        "cut": accuracies(found.network, task),
        "fine_tuned": accuracies(network, task),
    }
    checkpoint.unlink(missing_ok=True)
    return record


def sparse_cell(made: Bench, row: str, folder: Path) -> Record:
    """Train all parameters by gRDA, or by the same steps without a threshold, and watch what becomes zero.

    Args:
        made: The task.
        row: A name in `SPARSE`.
        folder: Of the cell: accuracy and sparsity after every epoch, as long as it trains.
    """
    task = made.task
    published = directional_pruning.PUBLISHED.get(task.name, directional_pruning.PAPER)
    settings = directional_pruning.shortened(published, task, epochs=made.epochs)
    if row == "sgd":
        settings = dataclasses.replace(settings, c=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "epochs.json"
    watch = (_watching(file, _meter(task.network, task.search)),)
    network = directional_pruning.sparse(task, made.seed, made.progress, settings=settings, watch=watch).network
    return {
        "dense": accuracies(task.network, task),
        "fine_tuned": accuracies(network, task),
        "sparsity": directional_pruning.sparsity(network).whole,
        "settings": dataclasses.asdict(settings),
        "by_epoch": _read_rows(file),
    }


def gated_cell(made: Bench, target: float) -> Record:
    """Train gates to a target threshold, all epochs long, and count what images cost.

    Args:
        made: The task.
        target: T.
    """
    task = made.task
    settings = channel_gating.scaled(task, target=target, epochs=made.epochs, seed=made.seed)
    result = channel_gating.run_channel_gating(task, settings, progress=made.progress)
    measured = {name: getattr(result, name).row() for name in ("search", "test")}
    return {"dense": accuracies(task.network, task), "layers": list(result.gated.names), **measured}


def _watching(file: Path, meter: Meter) -> Hook:
    """Write down accuracy on the search split and sparsity after every epoch; an epoch done again is written again."""

    def note(state: TrainingState) -> None:
        accuracy, _ = meter.accuracy_and_loss(state.network)
        zeros = directional_pruning.sparsity(state.network).whole
        row = {"epoch": state.epoch + 1, "search": accuracy, "sparsity": zeros}
        write(file, json.dumps([*_read_rows(file)[: state.epoch], row], indent=1))

    return Hook(after_epoch=note)


def _read_rows(file: Path) -> list[Record]:
    return json.loads(file.read_text()) if file.exists() else []


def _meter(network: nn.Module, split: Split) -> Meter:
    images, labels = split.take(len(split))
    return Meter(images, labels, dtype=number_format(network, images))


def _splits(task: Task) -> dict[str, Split]:
    return {"search": task.search, "test": task.test}
