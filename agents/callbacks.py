"""Observers of a search: the progress bar, and TensorBoard."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agents import plot
from agents.config import TrainConfig
from agents.episode import Episode, Memory
from agents.report import free_plan
from prune_env.envs.dynamics import Problem


class Bar:
    """A progress bar with the phase and the best accuracy; plain lines where the output is no terminal."""

    def __init__(self, console: Console, config: TrainConfig) -> None:
        self.console, self.config = console, config
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.line = self.progress.add_task("warm-up", total=config.episodes)
        self.best: Episode | None = None

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def resumed(self, memory: Memory) -> None:
        """Go to where the run is."""
        self.progress.update(self.line, completed=len(memory))
        if memory.best is not None:
            self.best = memory.episodes[memory.best]
            self.console.print(f"resumed after episode {len(memory)}, best accuracy {self.best.accuracy:.3f}")

    def played(self, episode: Episode, *, best: bool, scalars: dict[str, float]) -> None:
        """Advance."""
        self.best = episode if best or self.best is None else self.best
        found = f"best {self.best.accuracy:.3f} by {self.best.source}, episode {self.best.number}"
        text = f"seed {self.config.seed} · {episode.phase} · {found}"
        self.progress.update(self.line, completed=episode.number + 1, description=text)
        done, total = episode.number + 1, self.config.episodes
        if not self.console.is_terminal and (done == total or done % max(1, total // 4) == 0):
            self.console.print(f"{text} · {done}/{total}")

    def saved(self, memory: Memory) -> None:
        """Nothing to show."""


class TensorBoard:
    """Events: rewards, accuracy, sizes, keep per group and losses by episode; the plan as a picture at new bests."""

    def __init__(self, folder: Path, problem: Problem, hparams: dict[str, Any]) -> None:
        self.folder, self.problem, self.hparams = folder, problem, hparams
        self.writer: Any = None
        self.best: Episode | None = None
        self.uniform = tuple(problem.graph.counts(free_plan(problem, "uniform")).tolist())
        self.drawn = -1

    def resumed(self, memory: Memory) -> None:
        """Open the log; events after the checkpoint are purged."""
        with warnings.catch_warnings():
            # tensorboard looks at tensorflow's version, if that is installed
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter

        start = len(memory)
        self.writer = SummaryWriter(str(self.folder), purge_step=start if start else None)
        if memory.best is not None:
            self.best = memory.episodes[memory.best]
            self.drawn = self.best.number

    def played(self, episode: Episode, *, best: bool, scalars: dict[str, float]) -> None:
        """Log an episode."""
        self.best = episode if best or self.best is None else self.best
        dense = self.problem.dense
        values = {
            "search/reward": episode.reward,
            "search/accuracy": episode.accuracy,
            "search/loss": episode.loss,
            "search/macs_share": episode.macs / dense.macs,
            "search/params_share": episode.params / dense.params,
            "search/best_reward": self.best.reward,
            "search/best_accuracy": self.best.accuracy,
        }
        values |= {f"reward/{name}": value for name, value in episode.terms.items()}
        pairs = zip(self.problem.graph.groups, episode.counts, strict=True)
        values |= {f"keep/{group.name}": count / group.channels for group, count in pairs}
        for name, value in (values | scalars).items():
            self.writer.add_scalar(name, value, episode.number)
        self.writer.add_text("search/source", episode.source, episode.number)

    def saved(self, memory: Memory) -> None:
        """Draw the best plan if it is new since the last checkpoint, and push everything to disk."""
        if self.best is not None and self.best.number != self.drawn:
            figure = plot.plan_figure(self.problem, self.best.counts, self.uniform)
            self.writer.add_figure("plan/best", figure, self.best.number)
            self.drawn = self.best.number
        self.writer.flush()

    def finished(self, metrics: dict[str, float]) -> None:
        """HParams with the final metrics, into the same folder (add_hparams would make a nested run)."""
        from torch.utils.tensorboard.summary import hparams

        if self.writer is not None:
            for part in hparams(self.hparams, metrics):
                self.writer.file_writer.add_summary(part)
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, 0)
            self.writer.flush()

    def close(self) -> None:
        """Close the log."""
        if self.writer is not None:
            self.writer.close()
