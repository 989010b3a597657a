"""A cell: one method on one task at one budget with one seed, pruned, measured, fine-tuned, measured again.

Whatever the method, the network that comes out is measured by the same code on the same splits. What a record says
under `measured` and `plan` is a function of the cell and the protocol alone; clocks are kept apart.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.algorithms import ALGORITHMS
from agents.comparison import Cell, Comparison
from agents.comparison_methods import DENSE, RUNTIME_TRUSTS
from agents.comparison_store import Record, Store
from agents.config import TrainConfig, own_settings
from agents.record import RunFolder
from agents.report import fine_tuned, measure_test, row_of
from agents.rounds import make_workers
from agents.runtime_deploy import deployed_network
from agents.runtime_options import network_epochs
from agents.runtime_report import RuntimeReporter
from agents.runtime_stages import RuntimeLearner
from agents.runtime_train import create
from agents.search import best_plan, search
from agents.search_baselines import play
from agents.search_config import SearchConfig
from agents.train import problem_of
from baselines import METHODS, prune
from baselines.method import given_repair, given_scores
from baselines.runtime import run_runtime
from prune_env.envs.dynamics import Problem
from prune_env.number_format import number_format
from prune_env.pruning.engine.deployed import deploy
from prune_env.pruning.engine.measurement import compare_latency
from prune_env.pruning.measure import Measurement
from prune_env.pruning.plan import Plan
from prune_env.tasks.task import Task
from prune_env.tasks.training.loop import Progress

TIMED = 3
"""Test images that latencies are taken on."""

DECIDED = ("task", "weights", "budget", "algorithm", "episodes", "seed")
"""Fields of a run that a cell decides, beside those of the protocol."""

DONE, FAILED, TAKEN = "done", "failed", "taken"
"""How work on a cell ends: recorded, recorded as failed, or left to somebody else."""


@dataclass(frozen=True, eq=False)
class Work:
    """What a cell is measured with.

    Attributes:
        comparison: The protocol.
        cell: What is measured.
        task: Its task, dense.
        folder: For checkpoints.
        tell: Told what is under way.
    """

    comparison: Comparison
    cell: Cell
    task: Task
    folder: Path
    tell: Progress

    @property
    def weights(self) -> Path | None:
        """File with the dense weights, if they were given."""
        return self.comparison.files.get(self.cell.task)


@dataclass(frozen=True, eq=False)
class Found:
    """What a static method came up with.

    Attributes:
        network: Pruned and repaired.
        plan: What it keeps.
        problem: In which it was decided.
        task: The task it was decided for: the method may have trained its network before.
        facts: In which the row may differ from others.
    """

    network: nn.Module = field(repr=False)
    plan: Plan = field(repr=False)
    problem: Problem = field(repr=False)
    task: Task = field(repr=False)
    facts: Record


def by_method(work: Work) -> Found:
    """A heuristic or a published method."""
    comparison, cell, method = work.comparison, work.cell, METHODS[work.cell.base]
    result = prune(
        method,
        work.task,
        budget=cell.budget,
        seed=cell.seed,
        progress=work.tell,
        importance=comparison.importance_of(cell),
        **{name: getattr(comparison, name) for name in PRUNED_BY},
    )
    epochs = method.epochs(work.task)
    facts = {
        "importance": comparison.importance_of(cell) if method.importance is given_scores else "own",
        "repair": comparison.refit if method.repair is given_repair else "own",
        "own_training": f"{epochs} epochs" if epochs else "",
        "evaluations": result.problem.evaluator.evaluations,
        "own": {},
    }
    return Found(result.network, result.plan, result.problem, work.task, facts)


PRUNED_BY = ("budget_resource", "recalibrate", "refit", "calibration_images", "device")
"""Fields of the protocol that `baselines.prune` takes."""


def by_search(work: Work) -> Found:
    """A search, as far as it has come and then to its end."""
    config = work.comparison.train_config(work.cell, file=work.weights)
    assert isinstance(config, SearchConfig)
    problem = problem_of(work.task, config)
    memory = play(problem, config, run_folder(work.folder, config))
    return evaluated(work, problem, best_plan(problem, memory), len(memory), config)


def by_agent(work: Work) -> Found:
    """An agent, as far as it has come and then to its end; its best episode, chosen on the search split."""
    config = work.comparison.train_config(work.cell, file=work.weights)
    problem, run = problem_of(work.task, config), run_folder(work.folder, config)
    view = ALGORITHMS[config.algorithm].view
    with closing(make_workers(problem, config.env(), workers=1, view=view)) as venv:
        memory, _ = search(problem, config, venv, run)
    return evaluated(work, problem, best_plan(problem, memory), len(memory), config)


def run_folder(path: Path, config: TrainConfig) -> RunFolder:
    """The run folder that a cell under way has below its own."""
    run = path / "run"
    return RunFolder.open(run) if run.exists() else RunFolder.create(run, config)


def evaluated(work: Work, problem: Problem, plan: Plan, evaluations: int, config: TrainConfig) -> Found:
    """The plan of whoever evaluated many."""
    short = config.env().measure == "short-training"
    facts = {
        "importance": config.importance,
        "repair": config.refit,
        "own_training": "",
        "evaluations": evaluations,
        "paid_by": config.reward + (f", {config.short_steps} steps, lr {config.short_lr:g}" if short else ""),
        "own": own_settings(config, decided=(*DECIDED, *work.comparison.protocol)),
    }
    return Found(problem.evaluator.realise(plan), plan, problem, work.task, facts)


FINDERS: dict[str, Callable[[Work], Found]] = {
    "heuristic": by_method,
    "paper": by_method,
    "search": by_search,
    "learned": by_agent,
}
"""Kind -> how its plan is found."""


def static_record(work: Work) -> Record:
    """The record of a method that prunes for good."""
    comparison, start = work.comparison, time.process_time()
    resumed = work.folder.exists()
    found = FINDERS[work.cell.kind](work)
    seconds = {"find": time.process_time() - start}
    graph, plan, problem = found.problem.graph, found.plan, found.problem
    accuracy, loss = problem.evaluator.meter.accuracy_and_loss(found.network)
    searched = Measurement(accuracy, loss, graph.macs(plan), graph.params(plan))
    row = row_of(searched, measure_test(work.task, found.network, comparison.device))
    if comparison.fine_tune_epochs:
        start = time.process_time()
        row |= after_fine_tuning(work, found)
        seconds["fine_tune"] = time.process_time() - start
    kept = {group.name: [len(plan.keep[group.name]), group.channels] for group in graph.groups}
    return {
        "measured": row,
        "kept": kept,
        "plan": json.loads(plan.to_json()),
        "facts": found.facts | {"recalibrate": comparison.recalibrate, "epochs": comparison.fine_tune_epochs},
        "dense": {"macs": graph.macs(Plan({})), "params": graph.params(Plan({}))},
        "latency": latencies(work, found.network),
        # of a cell that was taken up again, the clock knows only the last part
        "cpu_seconds": None if resumed else seconds,
    }


def after_fine_tuning(work: Work, found: Found) -> Record:
    """Accuracy and loss of the network after the protocol's fine-tuning."""
    comparison = work.comparison
    # only epochs, rate, seed and device are read, which are the same for all kinds
    config = comparison.train_config(replace(work.cell, method="uniform"), file=work.weights)
    work.folder.mkdir(parents=True, exist_ok=True)
    file = work.folder / "fine_tune.safetensors"
    network = fine_tuned(found.network, work.task, config, checkpoint=file, progress=work.tell)
    accuracy, loss = found.problem.evaluator.meter.accuracy_and_loss(network)
    test = measure_test(work.task, network, comparison.device)
    return {
        "fine_tuned_search_accuracy": accuracy,
        "fine_tuned_test_accuracy": test[0],
        "fine_tuned_search_loss": loss,
        "fine_tuned_test_loss": test[1],
    }


def dense_record(work: Work) -> Record:
    """The record of the whole network."""
    task, dense = work.task, work.task.dense
    assert isinstance(dense, Measurement)
    return {
        "measured": row_of(dense, measure_test(task, task.network, work.comparison.device)),
        "facts": {"importance": "", "repair": "", "own_training": "", "evaluations": 0, "own": {}, "epochs": 0},
        "dense": {"macs": dense.macs, "params": dense.params},
        "latency": latencies(work, task.network),
        "cpu_seconds": {},
    }


def runtime_record(work: Work) -> Record:
    """The record of a method that chooses channels anew for every image. Its macs are means over images."""
    start, resumed = time.process_time(), work.folder.exists()
    rows, network, epochs = (runtime_agents if work.cell.method in RUNTIME_TRUSTS else runtime_baseline)(work)
    spread = rows["test"]
    row = {f"{split}_{name}": rows[split][name] for split in ("search", "test") for name in ("accuracy", "loss")}
    row |= {"params": spread["params"], "dynamic_macs": spread["dynamic_macs"]}
    row |= {f"dynamic_macs_share_{p}": share for p, share in spread["dynamic_macs_percentiles"].items()}
    forms = {"macs": spread["dynamic_macs"] / spread["dynamic_macs_share"]}
    forms["params"] = spread["params"] / spread["params_share"]
    facts = {"importance": "own", "repair": "own", "evaluations": 0, "own": {}, "epochs": 0}
    return {
        "measured": row,
        "facts": facts | {"own_training": f"{epochs} epochs, network and gates"},
        "dense": {name: round(value) for name, value in forms.items()},
        "latency": latencies(work, network),
        "cpu_seconds": None if resumed else {"find": time.process_time() - start},
    }


def runtime_agents(work: Work) -> tuple[Record, nn.Module, int]:
    """A run of `agents.train runtime`: its deployed network, measured, and the epochs it was trained for."""
    config = work.comparison.runtime_config(work.cell, trust=RUNTIME_TRUSTS[work.cell.method], file=work.weights)
    path = work.folder / "run"
    learner = RuntimeLearner(work.task, config, path)
    if not path.exists():
        create(path, config)
    learner.run(work.tell, lambda *_: None)
    rows = RuntimeReporter(work.task, learner, path, work.tell).rows()
    learned = rows["learned"]
    return learned, deployed_network(learner, offset=learned["offset"]), network_epochs(config)


def runtime_baseline(work: Work) -> tuple[Record, nn.Module, int]:
    """The same share in every layer, trained for as many epochs as the agents' network."""
    comparison, cell = work.comparison, work.cell
    epochs = network_epochs(comparison.runtime_config(cell, trust=0.5, file=work.weights))
    result = run_runtime(
        cell.method,
        work.task,
        epochs=epochs,
        budget=cell.budget,
        seed=cell.seed,
        progress=work.tell,
        folder=work.folder,
        threads=comparison.threads,
        device=comparison.device,
    )
    found = {"search": result.search.row(), "test": result.test.row()}
    return found, deploy(result.gated, result.decide), epochs


def latencies(work: Work, network: nn.Module) -> Record:
    """Median seconds for one image, in turns with the dense network; of one thread by its CPU clock.

    Cells share cores, and the wall's clock would count what others compute.
    """
    images, threads = work.task.test.take(TIMED)[0].float().split(1), work.comparison.threads
    clock = time.process_time if threads == 1 else None
    timed = compare_latency(work.task.network, network.cpu(), images, threads=threads, clock=clock)
    seconds = {"pruned_s": timed["deployed"].median_s, "dense_s": timed["dense"].median_s}
    return seconds | {"threads": threads, "batch": 1, "dtype": "float32", "clock": "wall" if clock is None else "cpu"}


def measured(comparison: Comparison, cell: Cell, folder: Path, *, tell: Progress = lambda *_: None) -> Record:
    """Measure a cell.

    Args:
        comparison: The protocol.
        cell: What to measure.
        folder: For checkpoints; the same call goes on from those that it finds.
        tell: Told what is under way.

    Raises:
        ValueError: The method refuses the task or the budget.
        TrainingDiverged: A training ended in NaN or Inf.
    """
    torch.set_num_threads(comparison.threads)
    task = comparison.task(cell, progress=tell)
    make = {DENSE: dense_record, "runtime": runtime_record}.get(cell.kind, static_record)
    start = time.perf_counter()
    record = make(Work(comparison, cell, task, folder, tell))
    facts = {"kind": cell.kind, "protocol": comparison.protocol | {"weights": _weights(comparison, cell)}}
    own = {"torch": torch.__version__, "number_format": str(number_format(task.network, task.example))}
    return facts | record | own | {"seconds": time.perf_counter() - start}


def _weights(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    """What is in the weights of a cell, without where they are."""
    return {task: sha for task, sha in comparison.protocol["weights"].items() if task == cell.task}


def work_on(folder: Path, cell: Cell) -> str:
    """Claim a cell, measure it and record what came out, be it a failure.

    Args:
        folder: The results folder.
        cell: One of its cells.

    Returns:
        `done`, `failed`, or `taken` where it was finished or somebody else's.

    Raises:
        KeyboardInterrupt: Interrupted; the cell can be gone on with.
    """
    store = Store.open(folder)
    with store.claimed(cell) as ours:
        if not ours:
            return TAKEN
        with logged(store.log(cell)):
            try:
                record, end = measured(store.comparison, cell, store.work(cell)), DONE
            except Exception as error:  # a cell may fail in any way, and the others go on
                traceback.print_exc()
                record, end = failure(cell, error), FAILED
            store.save(cell, record)
    return end


def failure(cell: Cell, reason: BaseException | str) -> Record:
    """The record of a cell that could not be measured."""
    line = " ".join(str(reason).split()) or type(reason).__name__
    if isinstance(reason, BaseException) and not isinstance(reason, ValueError | OSError | ArithmeticError):
        line = f"{type(reason).__name__}: {line}"
    return {"kind": cell.kind, "failed": line}


@contextmanager
def logged(file: Path) -> Iterator[None]:
    """What is printed goes to a file."""
    with file.open("a") as log, redirect_stdout(log), redirect_stderr(log):
        yield
