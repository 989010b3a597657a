"""The configuration of a task as data."""

from __future__ import annotations

from dataclasses import dataclass

from prune_env.checks import check_integer


@dataclass(frozen=True)
class TaskConfig:
    """What is pruned.

    Raises:
        ValueError: A field of the wrong type or value.
    """

    task: str = "digits-cnn"
    """Task name, `<data>-<network>`."""
    network: str | None = None
    """Other network than the task's: a zoo name, `torchvision:NAME` or `package.module:factory`."""
    weights: str | None = None
    """File with the dense weights (safetensors or a torch state dict); without it they are trained once and cached."""
    normalise: str | None = None
    """How images are normalised, by name or as six numbers; None takes the network's own."""
    seed: int = 0
    """Seed of the splits and of the dense training."""
    epochs: int | None = None
    """Epochs of the dense training; None takes the data set's own, 0 leaves random weights."""
    search_size: int | None = None
    """Images of the search split; None takes the data set's own."""
    image_size: int | None = None
    """Side to which image files are scaled, in pixels."""
    root: str | None = None
    """Data root; None takes `$PRUNE_ENV_DATA` or the user's cache."""

    def __post_init__(self) -> None:
        if not isinstance(self.task, str) or not self.task:
            raise ValueError(f"task is {self.task!r}; a name of the form <data>-<network> is allowed")
        for name in ("network", "weights", "normalise", "root"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} is {value!r}; text or None is allowed")
        check_integer("seed", self.seed, least=0)
        for name, least in (("epochs", 0), ("search_size", 1), ("image_size", 1)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=least)
