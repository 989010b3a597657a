"""What importances cost: seconds and peak memory of every criterion on a whole network.

Criteria are those of `prune_env.pruning.importance`, and the importance stages of the methods that bring one of their
own. Each is measured in a process of its own, which holds the network, its graph and the images and nothing else, so
that its peak is its own: MiB are those of resident memory that the first call takes beyond that. Images are those that
run through the network, counted, and with them the one that some criteria run to learn its shapes; Provable Filter
Pruning takes as many as its bound asks for. On a busy machine only the CPU seconds (of all threads) mean something.

    python -m benchmarks.importance_cost --task cifar10-resnet56 --weights FILE.safetensors
    python -m benchmarks.importance_cost --networks resnet56 vgg16_bn
"""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from baselines import METHODS
from baselines.method import Case, choices_of, given_scores, unprepared
from prune_env.checks import check_name
from prune_env.config import EnvConfig
from prune_env.envs.dynamics import Problem, open_steps
from prune_env.envs.reward import REWARDS
from prune_env.files import write
from prune_env.pruning.evaluator import Evaluator
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.importance import IMPORTANCES, score
from prune_env.pruning.measure import Measurement, Meter
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network
from prune_env.tasks.task import Task, make_task

CRITERIA = (
    *IMPORTANCES,
    *(
        name
        for name, method in METHODS.items()
        if method.importance is not given_scores and method.prepare is unprepared and name not in IMPORTANCES
    ),
)
"""Importances by name, then the methods with scores that no importance has, save those whose scores are trained."""
LONG = 10.0
"""Seconds of a call after which it is not repeated."""
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NETWORK, BATCH = "network.safetensors", "batch.safetensors"

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What importances cost.

    Raises:
        ValueError: An unknown criterion (names the closest), weights beside other networks, or no calls.
    """

    task: str = "cifar10-resnet56"
    """Task name: the images, and a network."""
    weights: str | None = None
    """File with the weights of the task's network; random ones without it."""
    networks: tuple[str, ...] = ()
    """Networks in the place of the task's, with random weights."""
    criteria: tuple[str, ...] = CRITERIA
    """Criteria to measure."""
    images: int = EnvConfig.calibration_images
    """Training images that a criterion may read."""
    repeats: int = 3
    """Calls, of which the median is told; one where it takes longer than ten seconds."""
    threads: int = 1
    """CPU threads."""
    out: Path | None = None
    """File for the rows as JSON."""

    def __post_init__(self) -> None:
        for name in self.criteria:
            check_name("criterion", name, CRITERIA)
        if self.networks and self.weights is not None:
            raise ValueError(f"weights are those of the task's network, not of {', '.join(self.networks)}")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; at least 1 is allowed")


@dataclass(frozen=True, eq=False)
class Subject:
    """A network and the images that criteria may read.

    Attributes:
        name: Of the network.
        network: The network.
        graph: Its graph.
        images: Normalised training images.
        labels: Their classes.
    """

    name: str
    network: nn.Module
    graph: LayerGraph
    images: Tensor
    labels: Tensor

    def case(self) -> Case:
        """A case as methods see it, without all that a decision problem computes beforehand."""
        steps, allowed = open_steps(self.graph)
        size = {resource: int(cost(self.graph.full)) for resource, cost in self.graph.cost.items()}
        problem = Problem(
            name=self.name,
            graph=self.graph,
            resource="macs",
            steps=steps,
            allowed=allowed,
            dense=Measurement(0.0, 0.0, size["macs"], size["params"]),
            scores={group.name: np.zeros(group.channels) for group in self.graph.groups},
            fields={},
            evaluator=Evaluator(
                self.network, self.graph, Meter(self.images[:1], self.labels[:1]), calibration=self.images
            ),
            reward=REWARDS["accuracy"],
            value=1.0,
        )
        return Case(problem, choices_of(problem, problem.budget_of(1.0)), problem.scores)


def store(task: Task, count: int, folder: Path) -> None:
    """Write what `read` makes a subject of."""
    images, labels = task.calibration(count)
    save_file({name: tensor.contiguous() for name, tensor in task.network.state_dict().items()}, folder / NETWORK)
    save_file({"images": images.contiguous(), "labels": labels.contiguous()}, folder / BATCH)


def read(folder: Path, *, network: str, classes: int) -> Subject:
    """The subject in a folder: little else is ever in memory, least of all a data set.

    Args:
        folder: From `store`.
        network: Name of the network.
        classes: Width of its output.
    """
    batch = load_file(folder / BATCH)
    _, channels, side, _ = batch["images"].shape
    built = make_network(network, classes=classes, channels=channels, side=side)
    built.load_state_dict(load_file(folder / NETWORK))
    return Subject(network, built, trace(built, batch["images"][:1]), batch["images"], batch["labels"])


def scoring(criterion: str, subject: Subject) -> Callable[[], object]:
    """A call that scores all groups, with nothing remembered from an earlier one."""
    if criterion in IMPORTANCES:
        return partial(score, criterion, subject.network, subject.graph, (subject.images, subject.labels))
    # a case of its own, because sensitivities are remembered by evaluator
    return partial(METHODS[criterion].importance, subject.case())


def measured(folder: Path, *, network: str, classes: int, criterion: str, repeats: int, threads: int) -> Row:
    """The row of a criterion; for a process of its own.

    Args:
        folder: From `store`.
        network: Name of the network.
        classes: Width of its output.
        criterion: A name in `CRITERIA`.
        repeats: Calls.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    subject = read(folder, network=network, classes=classes)
    call = scoring(criterion, subject)
    with images_run(subject.network) as sizes:
        before = fresh_peak()
        times = [timed(call)]
        after = peak()
    while len(times) < repeats and times[0][0] <= LONG:
        times.append(timed(scoring(criterion, subject)))
    seconds, cpu_seconds = np.median(times, axis=0).tolist()
    return {
        "network": network,
        "criterion": criterion,
        "images": sum(sizes),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "calls": len(times),
        "mib": None if before is None or after is None else after - before,
    }


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call, and seconds that this process computed meanwhile."""
    begin, cpu_begin = perf_counter(), process_time()
    call()
    return perf_counter() - begin, process_time() - cpu_begin


@contextlib.contextmanager
def images_run(network: nn.Module) -> Iterator[list[int]]:
    """Sizes of the batches that run through a network inside the context."""
    sizes: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def peak() -> float | None:
    """Most MiB that were resident since the start or `fresh_peak`; None on systems that do not tell.

    Not `ru_maxrss`: a process inherits that from the one that started it.
    """
    if not STATUS.exists():
        return None
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def fresh_peak() -> float | None:
    """The peak, moved down to what is resident now where the system allows it."""
    gc.collect()
    with contextlib.suppress(OSError):
        RESET.write_text("5")
    return peak()


def alone(folder: Path, task: Task, criterion: str, settings: Settings) -> Row:
    """The row of a criterion, measured in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(
            measured,
            folder,
            network=task.network_name,
            classes=task.classes,
            criterion=criterion,
            repeats=settings.repeats,
            threads=settings.threads,
        ).result()


def line(row: Row) -> str:
    """A row in Markdown."""
    seconds, cpu = (f"{s:.3f}" if s < 1 else f"{s:.1f}" for s in (row["seconds"], row["cpu_seconds"]))
    mib = "-" if row["mib"] is None else f"{row['mib']:.1f}"
    return f"| {row['criterion']} | {row['images']} | {seconds} | {cpu} | {mib} |"


def main(settings: Settings) -> None:
    """Measure everything and print a table for each network."""
    rows: list[Row] = []
    for name in settings.networks or (None,):
        task = make_task(settings.task, network=name, weights=settings.weights, epochs=0)
        print(f"\n{task.network_name}, {settings.images} images of {task.data}, threads: {settings.threads}\n")
        print("| criterion | images it runs | seconds | CPU seconds | MiB more than before |\n|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            store(task, settings.images, Path(folder))
            for criterion in settings.criteria:
                rows.append(alone(Path(folder), task, criterion, settings))
                print(line(rows[-1]), flush=True)
    if settings.out is not None:
        weights = None if settings.weights is None else Path(settings.weights).name
        facts = {"task": settings.task, "weights": weights, "images": settings.images, "threads": settings.threads}
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        write(settings.out, json.dumps({**facts, "rows": rows}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
