"""Dense networks: trained once for their settings, then loaded from the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from torch import nn

from prune_env.checks import did_you_mean
from prune_env.files import write
from prune_env.tasks.datasets import DATASETS, Splits, cache_root, data_root, find_dataset, load_splits
from prune_env.tasks.networks import NETWORKS, check_network, find_network, make_network
from prune_env.tasks.normalisation import parse
from prune_env.tasks.training import TrainSettings, train
from prune_env.tasks.training.loop import Progress
from prune_env.tasks.weights import load_weights, write_tensors

VERSION = 1
"""Counts changes of the code that change what a training gives; part of the hash."""

EPOCHS = {"digits": 30, "fashion-mnist": 15, "imagenet": 90}
"""Epochs of dense training where they are not the usual ones of `TrainSettings`."""


@dataclass(frozen=True)
class DenseSettings:
    """Everything that decides a dense network; equal settings have one place in the cache.

    Attributes:
        start: Digest of the file of weights that the training starts from; None for random ones.
    """

    data: str
    network: str
    normalise: str
    seed: int
    search: int
    side: int
    training: TrainSettings
    start: str | None = None

    def folder(self, root: Path) -> Path:
        """Where the network is kept: `root/dense/<task>-<hash>`."""
        own = dataclasses.asdict(self)
        if self.start is None:
            del own["start"]  # places in the cache are older than the field
        content = json.dumps({"version": VERSION, **own}, sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        name = f"{self.data}-{self.network}".replace(":", "_").replace("/", "_")
        return root / "dense" / f"{name}-{digest}"


def recipe(data: str, network: str, *, seed: int, **changes: object) -> TrainSettings:
    """The usual training of a network on a data set.

    Args:
        data: A name of `DATASETS`.
        network: A name that `find_network` knows.
        seed: Seed of order and augmentation.
        **changes: Fields of `TrainSettings` to set otherwise; None leaves them.

    Raises:
        ValueError: An unknown name, or a value that is not allowed.
    """
    entry = DATASETS[data]
    # Digits fill a few hundred tiny steps: more threads or bfloat16 gain nothing there.
    small = {"batch_size": 64, "dtype": "float32", "threads": 1} if data == "digits" else {}
    usual = {
        "epochs": EPOCHS.get(data, TrainSettings.epochs),
        "lr": find_network(network).lr,
        "crop": entry.crop,
        "flip": entry.flip,
        "seed": seed,
        **small,
    }
    return TrainSettings(**{**usual, **{name: value for name, value in changes.items() if value is not None}})


def usual_training(data: str, network: str, *, seed: int, **changes: object) -> TrainSettings:
    """The recipe; for images of a user's own, of which nobody knows whether they may be moved, one that moves none.

    Args:
        data: Name of the data set.
        network: Name of the network; not read where the data are a user's own.
        seed: Seed of order and augmentation.
        **changes: Fields of `TrainSettings` to set otherwise; None leaves them.

    Raises:
        ValueError: A value that is not allowed; names the field.
    """
    if data in DATASETS:
        return recipe(data, network, seed=seed, **changes)
    given = {name: value for name, value in changes.items() if value is not None}
    return TrainSettings(**{"crop": 0, "flip": False, "dtype": "float32", "seed": seed, **given})


def writable_root(root: Path | None = None) -> Path:
    """The data root where it may be written, else the user's cache: data are often kept read-only."""
    root = root or data_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    # The mode is looked at, too, because an administrator may write anywhere.
    writable = os.access(existing, os.W_OK) and existing.stat().st_mode & 0o222
    return root if writable else cache_root()


@dataclass(frozen=True, eq=False)
class Blank:
    """A task's network before it has weights, and all that decides which weights it will get.

    Attributes:
        network: With the weights that its training starts from, in eval mode.
        splits: The data.
        settings: What decides the dense weights.
        root: Folder of the cache.
    """

    network: nn.Module
    splits: Splits
    settings: DenseSettings
    root: Path


def blank(
    name: str,
    *,
    network: str | None = None,
    normalise: str | None = None,
    seed: int = 0,
    root: Path | str | None = None,
    search_size: int | None = None,
    image_size: int | None = None,
    start: Path | str | None = None,
    **changes: object,
) -> Blank:
    """Read a task's data and make its network, as it is before its training.

    Args:
        name: `<data>-<network>`, or the data's name alone where `network` is given.
        network: Used in place of the name's: a zoo name, `torchvision:NAME` or `package.module:factory`.
        normalise: A name of `NORMALISATIONS`, or numbers; None takes the network's, else the data set's.
        seed: Seed of the splits, the initial weights and the training.
        root: Data root; None takes `$PRUNE_ENV_DATA`, else the user's cache.
        search_size: Images of the search split; None takes the data set's.
        image_size: Side to which image files are scaled, in pixels.
        start: File of weights that the training starts from; None takes random ones.
        **changes: Fields of `TrainSettings` other than usual; None leaves the usual.

    Raises:
        ValueError: An unknown name (names the closest), a value that is not allowed, corrupt data, or weights that do
            not fit.
        FileNotFoundError: Missing data or weights; says which file to put where.
    """
    data, network_name = parse_name(name, network)
    if seed < 0:
        raise ValueError(f"seed is {seed}; 0 or more is allowed")
    training = recipe(data, network_name, seed=seed, **changes)
    text = _normalise_text(normalise, data, network_name)
    folder = Path(root).expanduser() if root else data_root()
    splits = load_splits(data, seed=seed, root=folder, normalise=text, search_size=search_size, image_size=image_size)
    channels, side, _ = splits.train.shape
    model = make_network(network_name, classes=splits.train.classes, channels=channels, side=side, seed=seed)
    _check_fits(model, network_name, splits)
    digest = None
    if start is not None:
        file = Path(start).expanduser()
        load_weights(model, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    settings = DenseSettings(data, network_name, text, seed, len(splits.search), side, training, digest)
    return Blank(model, splits, settings, writable_root(folder))


def _check_fits(network: nn.Module, name: str, splits: Splits) -> None:
    """Refuse a network that cannot run on the data, before hours of training."""
    image, classes = splits.train.take(1)[0], splits.train.classes
    try:
        with torch.no_grad():
            output = network.eval()(image)
    # A network of somebody's own may fail in any way.
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"network {name!r} fails on an image of shape {tuple(image.shape[1:])}: {line}") from None
    if not isinstance(output, torch.Tensor) or output.shape != (1, classes):
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(f"network {name!r} must give one score for each of {classes} classes, not {got}")


def train_dense(start: Blank, *, progress: Progress | None = None) -> Path:
    """Give a network its dense weights, from the cache or by training it; a killed training is taken up again.

    Processes that want the same network wait for the one that trains it.

    Args:
        start: The network is filled in place.
        progress: Told about every step of a training.

    Returns:
        The weights file, with `settings.json` beside it.

    Raises:
        ValueError: A cached file is corrupt.
        TrainingDiverged: The loss became NaN or Inf.
        OSError: The cache cannot be written.
    """
    folder = start.settings.folder(start.root)
    file = folder / "model.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock"):
            if not file.exists():
                _train(start, folder, progress)
    load_weights(start.network, file)
    return file


def _train(start: Blank, folder: Path, progress: Progress | None) -> None:
    checkpoint = folder / "checkpoint.safetensors"
    settings = start.settings
    report = train(
        start.network, start.splits.train, settings=settings.training, progress=progress, checkpoint=checkpoint
    )
    record = {**dataclasses.asdict(settings), "report": dataclasses.asdict(report)}
    write(folder / "settings.json", json.dumps(record, indent=2))
    write_tensors(start.network.state_dict(), folder / "model.safetensors")
    checkpoint.unlink()


def parse_name(name: str, network: str | None = None) -> tuple[str, str]:
    """Data set and network of a task's name.

    Args:
        name: `<data>-<network>`, or the data's name alone where `network` is given.
        network: Used in place of the name's.

    Raises:
        ValueError: An unknown data set or network; names the closest.
    """
    data = next((d for d in sorted(DATASETS, key=len, reverse=True) if name == d or name.startswith(f"{d}-")), None)
    if data is None or (network is None and name == data):
        if network is not None:
            find_dataset(name)
        tasks = [f"{d}-{n}" for d in DATASETS for n in NETWORKS]
        raise ValueError(
            f"task is {name!r}; {did_you_mean(name, tasks)}allowed is <data>-<network> with data {', '.join(DATASETS)} "
            f"and network {', '.join(NETWORKS)}, torchvision:NAME or package.module:factory"
        )
    chosen = network or name.removeprefix(f"{data}-")
    check_network(chosen)
    return data, chosen


def _normalise_text(normalise: str | None, data: str, network: str) -> str:
    """The normalisation as numbers: what is asked for, else the network's if it suits the images, else the data's."""
    entry = DATASETS[data]
    if normalise is not None:
        return str(parse(normalise, channels=entry.channels))
    own = find_network(network).normalise
    if own is None or (entry.channels != 3 and own != "half"):
        return str(entry.normalise)
    return str(parse(own, channels=entry.channels))
