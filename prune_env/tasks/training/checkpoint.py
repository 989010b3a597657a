"""Checkpoint of a training: one safetensors file with everything that the rest of it depends on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
from torch import Tensor

from prune_env.tasks.training.settings import TrainSettings
from prune_env.tasks.weights import read_tensors, write_tensors

FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """State after some epochs.

    Random numbers need no place in it: every epoch starts from a seed of its own.

    Attributes:
        epochs: Epochs done.
        losses: Mean training loss of each.
        accuracies: Accuracy of each on its augmented training images.
        tensors: Weights, buffers, the memory of the optimiser and of hooks, by prefixed names.
    """

    epochs: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    tensors: Mapping[str, Tensor]

    def write(self, path: Path, settings: TrainSettings) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        header = {
            "format": FORMAT,
            "epochs": self.epochs,
            "losses": self.losses,
            "accuracies": self.accuracies,
            "settings": dataclasses.asdict(settings),
        }
        write_tensors(self.tensors, path, metadata={"training": json.dumps(header)})

    @classmethod
    def read(cls, path: Path, settings: TrainSettings) -> Checkpoint:
        """Read the file that a training with the same settings wrote.

        Raises:
            ValueError: It is corrupt, or belongs to other settings (names the first that differs).
        """
        tensors = read_tensors(path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["training"])
            stored = header["settings"]
            result = cls(header["epochs"], tuple(header["losses"]), tuple(header["accuracies"]), tensors)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"checkpoint {path} is corrupt; remove it to start anew") from error
        for name, value in dataclasses.asdict(settings).items():
            if stored.get(name) != value:
                raise ValueError(f"checkpoint {path} was written with {name} {stored.get(name)!r}, not {value!r}")
        return result
