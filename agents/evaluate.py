"""`python -m agents.evaluate RUN`: replay a run's plan from its files and check that the record agrees."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from agents import runtime_evaluate
from agents.cli import guarded, parse
from agents.config import own_package
from agents.record import RunFolder
from agents.report import Row, measure_test, paid_facts
from agents.runtime_options import is_runtime
from agents.train import make_task_of, problem_of
from prune_env.pruning import archive
from prune_env.pruning.measure import count_macs, count_params, measure_latency

DISAGREES = 1
FORMS = {int: ",", float: ".4f", str: ""}


@dataclass(frozen=True)
class Order:
    """Replay the plan of a finished run in this process, and compare it with the run's record."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    threads: int = 1
    """Threads for the latency."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns 0, 1 if the record does not agree, 2 for bad input."""
    return guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    order = parse(Order, arguments, program="python -m agents.evaluate")
    run, console = RunFolder.open(order.run), Console()
    if is_runtime(order.run):
        return runtime_evaluate.evaluate(order.run, console, threads=order.threads)
    recorded = run.report.get("learned")
    if recorded is None or not (order.run / "model.safetensors").exists():
        raise ValueError(f"{order.run} is not finished: python -m {run.config.program} --resume {order.run}")
    found, latencies = replay(run, threads=order.threads)
    wrong = disagreements(recorded, found)
    console.print(_table(order.run, recorded, found))
    for name, latency in latencies.items():
        console.print(
            f"{name}: {latency.median_s * 1e3:.3f} ms for a batch of {latency.batch} (median, interquartile range "
            f"{latency.iqr_s * 1e3:.3f} ms; {latency.threads} thread, {latency.dtype}, {latency.device})"
        )
    for line in wrong:
        console.print(f"[bold red]the record does not agree[/]: {line}")
    if not wrong:
        console.print("the record agrees")
    return DISAGREES if wrong else 0


def replay(run: RunFolder, *, threads: int = 1) -> tuple[Row, dict[str, Any]]:
    """Measure the plan anew, from the dense network and the plan alone, and the stored network beside it.

    Returns:
        Facts under the names of the record, and latencies of the dense and the learned network.

    Raises:
        ValueError: A file is missing or corrupt, or does not fit.
    """
    config, plan = run.config, run.plan
    torch.set_num_threads(config.threads or torch.get_num_threads())
    task = make_task_of(config)
    problem = problem_of(task, config)
    plan.check(problem.graph)
    network = problem.evaluator.realise(plan)
    stored = archive.load(run.path, allow=own_package(config.task, config.network))
    accuracy, loss = problem.evaluator.meter.accuracy_and_loss(network)
    test_accuracy, test_loss = measure_test(task, network, config.device)
    found: Row = {
        "search_accuracy": accuracy,
        "test_accuracy": test_accuracy,
        "search_loss": loss,
        "test_loss": test_loss,
        "macs": count_macs(stored, task.example.to(config.device)),
        "params": count_params(stored),
    }
    if "paid_by" in run.report["learned"]:  # not in runs from before there was a choice
        found |= paid_facts(problem, config, plan)
    if config.fine_tune_epochs:
        accuracy, loss = problem.evaluator.meter.accuracy_and_loss(stored)
        test_accuracy, test_loss = measure_test(task, stored, config.device)
        found |= {"fine_tuned_search_accuracy": accuracy, "fine_tuned_test_accuracy": test_accuracy}
    example = task.example.to(config.device)
    both = {"dense": problem.evaluator.network, "learned": stored}
    return found, {name: measure_latency(one, example, threads=threads) for name, one in both.items()}


def disagreements(recorded: Row, found: Row) -> list[str]:
    """One line for each fact that is not what the record says; losses may differ in the last digits."""
    lines = []
    for name, value in found.items():
        same = math.isclose(value, recorded[name], rel_tol=1e-4) if "loss" in name else value == recorded.get(name)
        if not same:
            lines.append(f"{name} is {value}, recorded {recorded.get(name)}")
    return lines


def _table(path: Path, recorded: Row, found: Row) -> Table:
    built = Table(title=str(path), title_style="bold")
    for head in ("", "recorded", "replayed"):
        built.add_column(head, justify="left" if not head else "right")
    for name, value in found.items():
        cells = (f"{fact:{FORMS[type(fact)]}}" for fact in (recorded[name], value))
        built.add_row(name.replace("_", " "), *cells)
    return built


if __name__ == "__main__":
    sys.exit(main())
