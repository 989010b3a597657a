"""A task: a dense network, the data it is for, and everything needed to make both again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int64
from torch import Tensor, nn

from prune_env.tasks.dense import blank, train_dense
from prune_env.tasks.images import Split
from prune_env.tasks.normalisation import Normalisation
from prune_env.tasks.training.loop import Progress
from prune_env.tasks.weights import load_weights


@dataclass(frozen=True, eq=False)
class Task:
    """What is pruned and what it is measured on.

    Attributes:
        name: `<data>-<network>`.
        network: The dense network, in eval mode. Copy it before changing it.
        example: The first test image, normalised: an input of the right shape.
        train: Training split.
        search: Held out of the training set: all that searching and learning ever see.
        test: Read once per result.
        classes: Number of classes.
        normalise: How images become inputs.
        seed: Seed of the splits and of a dense training.
        data: Name of the data set.
        network_name: Name of the network.
        weights: File the weights are from; None for an untrained network.
        settings: Arguments for `make_task` that make an equal task; JSON can hold them.
        dense: Measurement of the dense network on the search split; `prune_env.make_task` fills it in.
    """

    name: str
    network: nn.Module
    example: Float[Tensor, "1 c h w"]
    train: Split
    search: Split
    test: Split
    classes: int
    normalise: Normalisation
    seed: int
    data: str
    network_name: str
    weights: str | None
    settings: Mapping[str, object]
    dense: object | None = None

    def calibration(self, count: int) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """The first `count` images of the training split, normalised and not augmented, with labels.

        Raises:
            ValueError: `count` is below 1.
        """
        return self.train.take(count)


def make_task(
    name: str,
    *,
    network: str | None = None,
    weights: Path | str | None = None,
    normalise: str | None = None,
    seed: int = 0,
    root: Path | str | None = None,
    epochs: int | None = None,
    search_size: int | None = None,
    image_size: int | None = None,
    progress: Progress | None = None,
) -> Task:
    """Make a task; without weights, its network is trained (digits: seconds) or loaded from the cache.

    Args:
        name: `<data>-<network>`, or the data's name alone where `network` is given.
        network: Used in place of the name's: a zoo name, `torchvision:NAME` or `package.module:factory`.
        weights: File of dense weights: safetensors, or a torch state dict.
        normalise: A name of `NORMALISATIONS`, or numbers; None takes the network's, else the data set's.
        seed: Seed of the splits and of the dense training.
        root: Data root; None takes `$PRUNE_ENV_DATA`, else the user's cache.
        epochs: Epochs of dense training; None takes the data set's, 0 leaves random weights.
        search_size: Images of the search split; None takes the data set's.
        image_size: Side to which image files are scaled, in pixels.
        progress: Told about a training as (steps done, steps in all, note).

    Raises:
        ValueError: An unknown name (names the closest), weights that do not fit or hold NaN, corrupt files.
        FileNotFoundError: Missing data or weights; says which file to put where.
        TrainingDiverged: The dense training ended in NaN or Inf.
    """
    start = blank(
        name,
        network=network,
        normalise=normalise,
        seed=seed,
        root=root,
        search_size=search_size,
        image_size=image_size,
        epochs=epochs or None,
    )
    file = None
    if weights is not None:
        file = Path(weights).expanduser().resolve()
        load_weights(start.network, file)
    elif epochs != 0:
        file = train_dense(start, progress=progress)
    settings, splits = start.settings, start.splits
    title = f"{settings.data}-{settings.network}"
    return Task(
        name=title,
        network=start.network.eval(),
        example=splits.train.take(1)[0],
        train=splits.train,
        search=splits.search,
        test=splits.test,
        classes=splits.train.classes,
        normalise=splits.train.normalise,
        seed=seed,
        data=settings.data,
        network_name=settings.network,
        weights=None if file is None else str(file),
        settings={
            "name": title,
            "weights": None if weights is None else str(file),
            "normalise": settings.normalise,
            "seed": seed,
            "root": None if root is None else str(Path(root).expanduser().resolve()),
            "epochs": epochs,
            "search_size": search_size,
            "image_size": image_size,
        },
    )
