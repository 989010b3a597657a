"""The run folder: what a run writes, atomically, and how it is read back.

config.json            written first; the run can be repeated from it
episodes.csv           one line per episode
plan.json              the best plan so far
checkpoint.safetensors the agent, its memory, and (as JSON in the header) episodes and counters: one file, so one
                       rename makes all of it current
report.json            finished rows of the final table
model.safetensors, network.json   the learned network, cut and repaired (see `prune_env.load`)
tensorboard/           events;  learning.png, plan.png
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from agents.config import TrainConfig
from agents.episode import Episode, Memory
from agents.search_config import config_of
from prune_env.files import write
from prune_env.pruning import archive
from prune_env.pruning.plan import Plan

VERSION = 1
COLUMNS = ("episode", "phase", "source", "reward", "accuracy", "loss", "macs", "params", "counts", "steps", "rungs")
EARLIER = COLUMNS[:-2]
"""Columns of runs from before networks were trained to be measured."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Attributes:
        path: Where it is.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> RunFolder:
        """A new folder that already holds its config; it appears at once or not at all.

        Raises:
            ValueError: It exists.
            OSError: It cannot be written.
        """
        refuse_existing(path)
        made = [parent for parent in path.parents if not parent.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except OSError:
            _forget(made)
            raise
        try:
            draft.chmod(0o755)
            write(draft / "config.json", config.to_json())
            os.rename(draft, path)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            _forget(made)
            raise
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run.

        Raises:
            ValueError: It is no run folder.
        """
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no run folder: it has no config.json")
        return cls(path)

    @property
    def config(self) -> TrainConfig:
        """Its config.

        Raises:
            ValueError: The file is corrupt or not allowed.
        """
        return self._parsed("config.json", config_of)

    @property
    def plan(self) -> Plan:
        """The best plan so far.

        Raises:
            ValueError: The file is missing or corrupt.
        """
        return self._parsed("plan.json", Plan.from_json)

    @property
    def report(self) -> dict[str, dict[str, Any]]:
        """Rows of the final table that are finished.

        Raises:
            ValueError: The file is corrupt.
        """
        return self._parsed("report.json", _rows) if (self.path / "report.json").exists() else {}

    def add_row(self, name: str, row: dict[str, Any]) -> None:
        """Add or replace a row of the report."""
        write(self.path / "report.json", json.dumps({**self.report, name: row}, indent=2))

    def save(self, memory: Memory, agent: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Make a checkpoint current, and then what is derived from it."""
        tensors = {f"agent/{name}": value.contiguous() for name, value in agent.items()}
        tensors |= {f"memory/{name}": torch.from_numpy(rows) for name, rows in memory.tensors().items()}
        episodes = [dataclasses.asdict(episode) for episode in memory.episodes]
        header = {"version": VERSION, "episodes": episodes, **state}
        write(self.path / "checkpoint.safetensors", to_bytes(tensors, {"state": json.dumps(header)}))

    def restore(self) -> tuple[Memory, dict[str, Tensor], dict[str, Any]] | None:
        """The current checkpoint, or None where the run had not reached one.

        Raises:
            ValueError: The file is corrupt.
        """
        path = self.path / "checkpoint.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            if state.pop("version") != VERSION:
                raise ValueError("it is of another version")
            tuples = [{name: tuple(v) for name, v in one.items() if isinstance(v, list)} for one in state["episodes"]]
            episodes = [Episode(**one | own) for one, own in zip(state.pop("episodes"), tuples, strict=True)]
            rows: dict[str, np.ndarray] = {name: value.numpy() for name, value in _below(tensors, "memory/").items()}
            return Memory.of(episodes, rows), _below(tensors, "agent/"), state
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is corrupt: {str(error).splitlines()[0]}") from None

    def write_episodes(self, episodes: list[Episode]) -> None:
        """Write `episodes.csv` anew, with exactly these."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(COLUMNS)
        lines.writerows(map(_line, episodes))
        write(self.path / "episodes.csv", text.getvalue())

    def read_episodes(self) -> list[Episode]:
        """What `episodes.csv` tells (not the terms of rewards), without a line that was torn by a kill.

        Raises:
            ValueError: The file is corrupt.
        """
        return self._parsed("episodes.csv", _episodes) if (self.path / "episodes.csv").exists() else []

    def append_episode(self, episode: Episode) -> None:
        """Add a line; a line torn by a kill goes when the run is resumed."""
        with (self.path / "episodes.csv").open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(_line(episode))

    def _parsed(self, name: str, parse: Any) -> Any:
        path = self.path / name
        try:
            return parse(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is corrupt: {str(error).splitlines()[0]}") from None


def refuse_existing(path: Path) -> None:
    """Refuse to write over a run.

    Raises:
        ValueError: The folder exists.
    """
    if path.exists():
        raise ValueError(f"run folder {path} already exists; continue it with --resume {path}, or name other --runs")


def _line(episode: Episode) -> tuple[Any, ...]:
    counts = " ".join(map(str, episode.counts))
    sizes = (episode.macs, episode.params)
    scores = (episode.reward, episode.accuracy, episode.loss)
    rungs = " ".join(map(repr, episode.rungs))
    return (episode.number, episode.phase, episode.source, *scores, *sizes, counts, episode.steps, rungs)


def _episodes(text: str) -> list[Episode]:
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    if not lines or tuple(lines[0]) not in (COLUMNS, EARLIER):
        raise ValueError(f"its first line is not {','.join(COLUMNS)}")
    episodes = [_episode(*line) for line in lines[1:]]
    if [episode.number for episode in episodes] != list(range(len(episodes))):
        raise ValueError("its episodes are not numbered from 0")
    return episodes


def _episode(number: str, phase: str, source: str, *values: str) -> Episode:
    reward, accuracy, loss, macs, params, counts, steps, rungs = (*values, "0", "")[: len(COLUMNS) - 3]
    return Episode(
        int(number),
        phase,
        source,
        *(float(reward), float(accuracy), float(loss)),
        *(int(macs), int(params)),
        tuple(map(int, counts.split())),
        steps=int(steps),
        rungs=tuple(map(float, rungs.split())),
    )


def _rows(text: str) -> dict[str, dict[str, Any]]:
    rows = json.loads(text)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError("a report is a JSON object of rows")
    return rows


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _forget(folders: list[Path]) -> None:
    """Remove empty folders that were made on the way."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def save_network(folder: Path, network: nn.Module, plan: Plan) -> None:
    """Put the network into a folder that holds other files too; the tensors come last, and mark the run as finished."""
    with tempfile.TemporaryDirectory(prefix=".model.", dir=folder) as draft:
        made = Path(draft) / "model"
        archive.save(network, plan, made)
        for file in sorted(made.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            os.replace(file, folder / file.name)
