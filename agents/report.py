"""The report of a run at one budget: dense, uniform, error_curves, random, learned and policy, on both splits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from agents.config import TrainConfig
from agents.record import RunFolder
from baselines import allocate, heuristics
from baselines.method import Case, case_of, plan_of
from prune_env.envs import dynamics
from prune_env.envs.dynamics import Problem
from prune_env.number_format import number_format
from prune_env.pruning.measure import Measurement, Meter
from prune_env.pruning.plan import Plan
from prune_env.tasks.dense import recipe
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainSettings, train
from prune_env.tasks.training.loop import Progress

Row = dict[str, Any]
FREE = {"uniform": heuristics.UNIFORM, "error_curves": heuristics.ERROR_CURVES}
"""Rows of plans that no evaluation went into: what a search finds beyond them is what it is worth."""


@dataclass(frozen=True, eq=False)
class Reporter:
    """Measures plans and writes finished rows into the run's report; a row that is there is not measured again.

    Attributes:
        task: Has the test split.
        problem: Measures on the search split, and repairs.
        config: Of the run.
        run: Where rows go.
        progress: Told what is under way: (done, total, what).
    """

    task: Task
    problem: Problem
    config: TrainConfig
    run: RunFolder
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, what: None)

    def dense(self) -> None:
        """The row of the whole network."""
        if "dense" in self.run.report:
            return
        network, dense = self.problem.evaluator.network, self.problem.dense
        test = measure_test(self.task, network, self.config.device)
        self.run.add_row("dense", row_of(dense, test))

    def plan(self, name: str, plan: Plan, **facts: Any) -> None:
        """The row of a plan: its network, cut and repaired once, on both splits."""
        if name in self.run.report:
            return
        evaluator, paid = self.problem.evaluator, paid_facts(self.problem, self.config, plan)
        network = evaluator.realise(plan)
        accuracy, loss = evaluator.meter.accuracy_and_loss(network)
        measured = Measurement(accuracy, loss, self.problem.graph.macs(plan), self.problem.graph.params(plan))
        test = measure_test(self.task, network, self.config.device)
        kept = [len(plan.keep[group.name]) for group in self.problem.graph.groups]
        self.run.add_row(name, row_of(measured, test) | {"counts": kept} | paid | facts)

    def free(self) -> dict[str, Plan]:
        """The plans that cost no evaluation, and their rows."""
        plans = {name: free_plan(self.problem, name) for name in FREE}
        for name, plan in plans.items():
            self.plan(name, plan)
        return plans

    def random(self) -> Plan:
        """The best of the random feasible plans that the run is told to draw, at least one, and its row."""
        case, rng = case_of(heuristics.RANDOM, self.problem), np.random.default_rng([self.config.seed, 1])
        drawn = [plan_of(case, allocate.random(case.choices, rng)) for _ in range(self.config.drawn)]
        if "random" in self.run.report:
            return drawn[self.run.report["random"]["episode"]]
        ranks = []
        for i, plan in enumerate(drawn):
            ranks.append(rank_of(self.problem, self.problem.evaluator.measure(plan)))
            self.progress(i + 1, len(drawn), "random plans")
        best = max(range(len(drawn)), key=lambda i: (*ranks[i], -i))
        self.plan("random", drawn[best], tried=len(drawn), episode=best)
        return drawn[best]

    def fine_tune(self, name: str, plan: Plan) -> nn.Module | None:
        """Train the network of a plan and add both accuracies to its row; its network, or None without epochs."""
        if not self.config.fine_tune_epochs:
            return None
        network = fine_tuned(
            self.problem.evaluator.realise(plan),
            self.task,
            self.config,
            checkpoint=self.run.path / f"fine_tune_{name}.safetensors",
            progress=lambda done, total, what: self.progress(done, total, f"fine-tuning {name}"),
        )
        row = self.run.report[name]
        if "fine_tuned_test_accuracy" not in row:
            accuracy, loss = self.problem.evaluator.meter.accuracy_and_loss(network)
            test = measure_test(self.task, network, self.config.device)
            facts = {
                "fine_tune_epochs": self.config.fine_tune_epochs,
                "fine_tuned_search_accuracy": accuracy,
                "fine_tuned_search_loss": loss,
                "fine_tuned_test_accuracy": test[0],
                "fine_tuned_test_loss": test[1],
            }
            self.run.add_row(name, row | facts)
        return network


def fine_tuned(
    network: nn.Module, task: Task, config: TrainConfig, *, checkpoint: Path, progress: Progress | None = None
) -> nn.Module:
    """A trained copy of a pruned network.

    Args:
        network: It is left as it is.
        task: On whose training split.
        config: Says epochs (below 1: the first so many images of the split, once), learning rate, seed and device.
        checkpoint: File to write after each epoch, and to go on from.
        progress: Told about every step.

    Raises:
        TrainingDiverged: The loss became NaN or Inf.
    """
    # the evaluator may hand out a network whose tensors do not require gradients
    trained = copy.deepcopy(network).requires_grad_(True)
    images = math.ceil(len(task.train) * min(config.fine_tune_epochs, 1))
    train(
        trained,
        task.train.at(torch.arange(images)) if images < len(task.train) else task.train,
        settings=fine_tune_settings(task, config),
        progress=progress,
        checkpoint=checkpoint,
        device=config.device,
    )
    return trained


def fine_tune_settings(task: Task, config: TrainConfig) -> TrainSettings:
    """The dense training's recipe, shorter and with a lower peak."""
    own = recipe(task.data, task.network_name, seed=config.seed, epochs=math.ceil(config.fine_tune_epochs))
    return replace(own, lr=config.fine_tune_lr)


def paid_facts(problem: Problem, config: TrainConfig, plan: Plan) -> Row:
    """What a search is paid for a plan: by which measure, and what that says; all else in a row is measured at once."""
    paid = problem.evaluator.measure(plan)
    return {"paid_by": config.env().measure, "paid_accuracy": paid.accuracy, "paid_steps": paid.steps}


def free_plan(problem: Problem, name: str) -> Plan:
    """The plan, at the problem's budget, of a row that costs no evaluation: a name in `FREE`."""
    case: Case = case_of(FREE[name], problem)
    return plan_of(case, FREE[name].allocate(case))


def rank_of(problem: Problem, measured: Measurement) -> tuple[float, float]:
    """What plans are compared by: reward, and among equals the lower loss."""
    terms = problem.reward(problem.dense, measured, dynamics.start(problem).budget)
    return float(sum(terms.values())), -measured.loss


def measure_test(task: Task, network: nn.Module, device: str) -> tuple[float, float]:
    """Accuracy and loss on the test split."""
    images, labels = task.test.take(len(task.test))
    return Meter(images, labels, dtype=number_format(network, images), device=device).accuracy_and_loss(network)


def row_of(search: Measurement, test: tuple[float, float]) -> Row:
    """A row of the report."""
    return {
        "search_accuracy": search.accuracy,
        "test_accuracy": test[0],
        "search_loss": search.loss,
        "test_loss": test[1],
        "macs": search.macs,
        "params": search.params,
    }


def table(runs: list[tuple[TrainConfig, dict[str, Row]]]) -> Table:
    """The final table: one block of rows, means over seeds, with each seed's test accuracy if there are several."""
    config, rows = runs[0]
    whole = rows["dense"]
    title = (
        f"{config.task} at {config.budget:g} {config.budget_resource}, {config.algorithm}, {config.episodes} episodes"
    )
    several = len(runs) > 1
    built = Table(title=title, caption=_caption(config, runs), title_style="bold")
    built.add_column("plan", min_width=max(map(len, rows)))  # names are not cut on a narrow terminal
    tuned = any("fine_tuned_test_accuracy" in row for row in rows.values())
    heads = ["search accuracy", "test accuracy"]
    heads += ["each seed"] * several + ["fine-tuned search", "fine-tuned test"] * tuned + ["macs", "params"]
    for head in heads:
        built.add_column(head, justify="right")
    for name in rows:
        some = [report[name] for _, report in runs if name in report]
        cells = [_mean(some, "search_accuracy"), _mean(some, "test_accuracy")]
        cells += [" ".join(f"{row['test_accuracy']:.3f}" for row in some)] * several
        cells += [_mean(some, f"fine_tuned_{split}_accuracy") for split in ("search", "test")] * tuned
        cells += [_size(some, "macs", whole), _size(some, "params", whole)]
        built.add_row(name, *cells, style="bold" if name == "learned" else None)
    return built


def _caption(config: TrainConfig, runs: list[tuple[TrainConfig, dict[str, Row]]]) -> str:
    seeds = ", ".join(str(one.seed) for one, _ in runs)
    repair = "recalibrated" if config.recalibrate else "not recalibrated"
    learned = [report.get("learned", {}) for _, report in runs]
    found = "; ".join(f"episode {row.get('episode')}, {row.get('source')}" for row in learned)
    random = f" random: best of {config.drawn} on the search split;" if "random" in runs[0][1] else ""
    policy = "; policy: the agent's own last plan" if "policy" in runs[0][1] else ""
    return (
        f"seeds {seeds}{' (means)' if len(runs) > 1 else ''}; {config.importance} importance, {repair}, "
        f"refit {config.refit}, paid by {config.env().measure};{random} learned: best episode ({found}){policy}"
    )


def _mean(rows: list[Row], key: str) -> str:
    values = [row[key] for row in rows if key in row]
    return f"{np.mean(values):.4f}" if values else ""


def _size(rows: list[Row], key: str, whole: Row) -> str:
    mean = float(np.mean([row[key] for row in rows]))
    return f"{mean:,.0f} ({mean / whole[key]:.2f})"
