"""`python -m agents.search_baselines`: a search without learning, in a run folder like an agent's.

The search is a pure function of its seed and its evaluations, and every evaluation is a line of `episodes.csv`. So a
run that was killed at any moment goes on from that file alone, and ends like one that was not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console

from agents import plot
from agents.callbacks import Bar, TensorBoard
from agents.cli import INTERRUPTED, guarded, parse, stages
from agents.config import resolved
from agents.episode import PHASES, Episode, Memory
from agents.record import RunFolder, refuse_existing, save_network
from agents.report import Reporter, Row, table
from agents.search import Observer, best_plan, settings_of
from agents.search_config import SearchConfig
from agents.train import finished, make_task_of, problem_of
from baselines.allocate import Counts
from baselines.method import Case, case_of, plan_of
from baselines.race import Race
from baselines.search import begin, search_method, terms
from baselines.trials import Search
from prune_env.envs.dynamics import Problem
from prune_env.files import sweep, write
from prune_env.tasks.task import Task

SEARCHING = "searching"
"""Phase of the episodes after the known plans."""


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    config: tyro.conf.OmitArgPrefixes[SearchConfig]
    """The run."""
    runs: Path = Path("runs")
    """Folder in which the run's folder is made."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run folder to go on with; all other settings are its own."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    order, console = parse(Order, arguments, program="python -m agents.search_baselines"), Console()
    config, path = order.config, order.resume
    if path is None:
        config = resolved(config)
        path = order.runs / config.name
        refuse_existing(path)
    else:
        config = _resumed(path)
    try:
        report = _run(config, path, console)
    except KeyboardInterrupt:
        resume = f"--resume {path}" if path.exists() else "the same arguments: nothing was evaluated yet"
        console.print(f"\ninterrupted; go on with: python -m agents.search_baselines {resume}", soft_wrap=True)
        return INTERRUPTED
    console.print(table([(config, report)]))
    console.print(f"run folder: {path}", soft_wrap=True)
    return 0


def _resumed(path: Path) -> SearchConfig:
    """The config of the run to go on with.

    Raises:
        ValueError: It is no run, or an agent's.
    """
    config = RunFolder.open(path).config
    if not isinstance(config, SearchConfig):
        raise ValueError(f"{path} is an agent's run; go on with: python -m {config.program} --resume {path}")
    return config


def _run(config: SearchConfig, path: Path, console: Console) -> dict[str, Row]:
    """One run from where it is to its end; its report.

    Raises:
        ValueError: Bad input; nothing is left behind if the run had not begun.
    """
    if finished(path):
        return RunFolder.open(path).report
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config = replace(config, threads=torch.get_num_threads())
    console.rule(f"{config.task}, {config.algorithm}, seed {config.seed}")
    with stages(console) as tell:
        task = make_task_of(config, progress=tell)
        problem = problem_of(task, config)
    run = RunFolder.open(path) if path.exists() else RunFolder.create(path, config)
    sweep(path)
    _search_and_report(task, problem, run, console)
    return run.report


def _search_and_report(task: Task, problem: Problem, run: RunFolder, console: Console) -> None:
    """Evaluations, rows, pictures, network."""
    config = _resumed(run.path)
    with closing(TensorBoard(run.path / "tensorboard", problem, settings_of(config))) as board:
        with Bar(console, config) as bar:
            memory = play(problem, config, run, observers=(bar, board))
        if len(memory) < config.episodes:
            console.print(f"{len(memory)} evaluations: no other plan was found at this budget")
        best = memory.episodes[memory.best or 0]
        learned = best_plan(problem, memory)
        with stages(console) as tell:
            reporter = Reporter(task, problem, config, run, tell)
            reporter.dense()
            plans = reporter.free()
            reporter.plan("learned", learned, source=best.source, episode=best.number)
            tuned = {name: reporter.fine_tune(name, plan) for name, plan in {**plans, "learned": learned}.items()}
        rows = run.report
        curve = plot.learning_figure(problem, memory.inside, rows, sources={config.algorithm: plot.BLUE})
        write(run.path / "learning.png", plot.png(curve))
        figure = plot.plan_figure(problem, best.counts, memory.episodes[0].counts)
        write(run.path / "plan.png", plot.png(figure))
        board.finished({f"final/{name}_test_accuracy": row["test_accuracy"] for name, row in rows.items()})
        save_network(run.path, tuned["learned"] or problem.evaluator.realise(learned), learned)


class Evaluations(Memory):
    """Episodes without a learner, of which only those inside the budget can be the best (NetAdapt looks above it)."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.resource, self.limit = problem.resource, problem.budget_of(problem.value).limit

    @property
    def best(self) -> int | None:
        """Number of the best episode inside the budget; the earliest among equals."""
        inside = self.inside
        return max(inside, key=lambda episode: (*episode.rank, -episode.number)).number if inside else None

    @property
    def inside(self) -> list[Episode]:
        """The episodes inside the budget."""
        return [episode for episode in self.episodes if getattr(episode, self.resource) <= self.limit]


def play(problem: Problem, config: SearchConfig, run: RunFolder, *, observers: Sequence[Observer] = ()) -> Evaluations:
    """Run, or resume, the evaluations of a run.

    Returns:
        All of them, in order.

    Raises:
        ValueError: The run's `episodes.csv` is corrupt, or is not of this problem.
    """
    case = case_of(search_method(config.algorithm), problem, seed=config.seed)
    memory = Evaluations(problem)
    memory.episodes.extend(run.read_episodes())
    search = begin(config.algorithm, case, evaluations=config.episodes)
    try:
        search = _retold(search, memory, problem)
    except ValueError as error:
        raise ValueError(f"{run.path / 'episodes.csv'} is not of this run: {error}") from None
    run.write_episodes(memory.episodes)
    for observer in observers:
        observer.resumed(memory)
    while (counts := search.ask()) is not None:
        episode = _evaluated(case, search, counts, race_of(config, memory.episodes))
        search = search.tell(counts, episode.rank)
        memory.episodes.append(episode)
        best = memory.best == episode.number
        for observer in observers:
            observer.played(episode, best=best, scalars={})
            observer.saved(memory)
        run.append_episode(episode)  # after the observers: what a line tells of is in the events, too
        if best:
            write(run.path / "plan.json", best_plan(problem, memory).to_json())
    write(run.path / "plan.json", best_plan(problem, memory).to_json())
    return memory


def _retold(search: Search, memory: Memory, problem: Problem) -> Search:
    """The search that was told of all recorded episodes.

    Raises:
        ValueError: One of them is not of this problem.
    """
    for episode in memory.episodes:
        if len(episode.counts) != len(problem.graph.groups):
            raise ValueError(f"episode {episode.number} has {len(episode.counts)} counts, {problem.name} other groups")
        search = search.tell(np.array(episode.counts, dtype=np.int64)[list(problem.steps)], episode.rank)
    return search


def race_of(config: SearchConfig, earlier: Sequence[Episode]) -> Race | None:
    """What a plan has to beat at each rung of its training; None where all are trained to the end."""
    return Race(tuple(episode.rungs for episode in earlier), config.stop_worst) if config.stop_worst else None


def _evaluated(case: Case, search: Search, counts: Counts, race: Race | None) -> Episode:
    """The next episode: a plan, cut, repaired and measured on the search split, as far as the race lets it."""
    problem, plan, source = case.problem, plan_of(case, counts), search.source(counts)
    measured, stopped = (problem.evaluator.measure(plan), {}) if race is None else race.measure(problem.evaluator, plan)
    paid = terms(case, measured) | stopped
    return Episode(
        len(search.trials),
        PHASES[0] if source in search.known else SEARCHING,
        source,
        sum(paid.values()),
        measured.accuracy,
        measured.loss,
        measured.macs,
        measured.params,
        tuple(problem.graph.counts(plan).tolist()),
        paid,
        measured.steps,
        measured.rungs,
    )


if __name__ == "__main__":
    sys.exit(main())
