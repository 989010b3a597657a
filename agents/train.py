"""`python -m agents.train`: learn a plan for a network at a budget. Without arguments, the digits demonstration."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from stable_baselines3.common.vec_env import VecEnv

from agents import plot
from agents.algorithms import ALGORITHMS
from agents.callbacks import Bar, TensorBoard
from agents.cli import INTERRUPTED, guarded, parse, stages
from agents.config import DEMONSTRATION, TrainConfig, resolved
from agents.record import RunFolder, refuse_existing, save_network
from agents.report import Reporter, Row, table
from agents.rounds import make_workers
from agents.search import best_plan, policy_plan, search, settings_of, view_of
from baselines.shaping import potential_of
from prune_env.config import Material, build, make_task
from prune_env.envs.dynamics import Problem
from prune_env.envs.predictor import Predictor
from prune_env.files import sweep, write
from prune_env.tasks.task import Task

PROGRAM = "python -m agents.train"


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    """The run."""
    runs: Path = Path("runs")
    """Folder in which the run's folder is made."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run folder to go on with; all other settings are its own."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["runtime"]:
        from agents import runtime_train

        return guarded(lambda: runtime_train.main(given[1:]))
    return guarded(lambda: _main(given))


def _main(arguments: list[str]) -> int:
    order = parse(Order, arguments, program=PROGRAM)
    if ALGORITHMS[order.config.algorithm].defaults:
        # once more: what was not given is then the algorithm's own
        own = Order(TrainConfig.of(order.config.algorithm))
        order = parse(Order, arguments, program=PROGRAM, default=own)
    config, runs = order.config if arguments else DEMONSTRATION, order.runs
    if order.resume is not None:
        config, runs = RunFolder.open(order.resume).config, order.resume.absolute().parent
        if config.program != TrainConfig.program:
            raise ValueError(f"{order.resume} goes on with: python -m {config.program} --resume {order.resume}")
    config = resolved(config)
    series = [replace(config, seed=seed) for seed in config.seeds or (config.seed,)]
    paths = {one.seed: runs / one.name for one in series}
    if order.resume is not None:
        paths[config.seed] = order.resume
    for path in paths.values() if order.resume is None else ():
        refuse_existing(path)
    return _series(series, paths, Console())


def _series(series: list[TrainConfig], paths: dict[int, Path], console: Console) -> int:
    """Run or resume one after another; say how to go on if that is interrupted."""
    reports = []
    for config in series:
        path = paths[config.seed]
        try:
            reports.append((config, _run(config, path, console)))
        except KeyboardInterrupt:
            resume = f"--resume {path}" if path.exists() else "the same arguments: no episode was played yet"
            console.print(f"\ninterrupted; go on with: python -m agents.train {resume}", soft_wrap=True)
            return INTERRUPTED
    console.print(table(reports))
    for config in series:
        console.print(f"run folder: {paths[config.seed]}", soft_wrap=True)
    return 0


def _run(config: TrainConfig, path: Path, console: Console) -> dict[str, Row]:
    """One run from where it is to its end; its report.

    Raises:
        ValueError: Bad input; nothing is left behind if the run had not begun.
    """
    if finished(path):
        return RunFolder.open(path).report
    if path.exists():
        config = RunFolder.open(path).config
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config = replace(config, threads=torch.get_num_threads())
    console.rule(f"{config.task}, {config.algorithm}, seed {config.seed}")
    with stages(console) as tell:
        task = make_task_of(config, progress=tell)
        problem = problem_of(task, config)
    shaping = config.shaping()
    if shaping is not None:
        potential_of(shaping.name, problem)  # refused before there is a folder, and here, not in a worker
    run = RunFolder.open(path) if path.exists() else RunFolder.create(path, config)
    sweep(path)
    with closing(make_workers(problem, config.env(), workers=config.workers, view=view_of(config))) as venv:
        _search_and_report(Parts(task, problem, config, run, venv), console)
    return run.report


@dataclass(frozen=True, eq=False)
class Parts:
    """What a run works with."""

    task: Task
    problem: Problem
    config: TrainConfig
    run: RunFolder
    venv: VecEnv


def _search_and_report(parts: Parts, console: Console) -> None:
    """Episodes, rows, pictures, network."""
    problem, config, run = parts.problem, parts.config, parts.run
    with closing(TensorBoard(run.path / "tensorboard", problem, settings_of(config))) as board:
        with Bar(console, config) as bar:
            memory, learner = search(problem, config, parts.venv, run, observers=(bar, board))
        best = memory.episodes[memory.best or 0]
        learned = best_plan(problem, memory)
        write(run.path / "plan.json", learned.to_json())
        policy = policy_plan(problem, learner, parts.venv)
        with stages(console) as tell:
            reporter = Reporter(parts.task, problem, config, run, tell)
            reporter.dense()
            plans = reporter.free()
            if config.drawn:
                plans["random"] = reporter.random()
            reporter.plan("learned", learned, source=best.source, episode=best.number)
            reporter.plan("policy", policy)
            tuned = {name: reporter.fine_tune(name, plan) for name, plan in {**plans, "learned": learned}.items()}
        rows = run.report
        write(run.path / "learning.png", plot.png(plot.learning_figure(problem, memory.episodes, rows)))
        uniform = tuple(problem.graph.counts(plans["uniform"]).tolist())
        figure = plot.plan_figure(problem, best.counts, uniform)
        write(run.path / "plan.png", plot.png(figure))
        board.finished({f"final/{name}_test_accuracy": row["test_accuracy"] for name, row in rows.items()})
        network = tuned["learned"] or problem.evaluator.realise(learned)
        save_network(run.path, network, learned)


def finished(path: Path) -> bool:
    """Whether a run is complete."""
    return (path / "model.safetensors").exists()


def make_task_of(config: TrainConfig, *, progress: Any = None) -> Task:
    """The task of a run, with its dense measurement."""
    if config.predictor is not None:
        Predictor.read(config.predictor)  # refused here, before a dense training
    options = asdict(config.env().task)
    return make_task(options.pop("task"), progress=progress, **options)


def problem_of(task: Task, config: TrainConfig) -> Problem:
    """The decision problem of a run: the one that `prune_env.config.make` builds, from a task that is there already."""
    env = config.env()
    return build(Material.of(task, env), env)


if __name__ == "__main__":
    sys.exit(main())
