"""Data sets by name, and their seeded train, search and test splits."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prune_env.checks import did_you_mean
from prune_env.tasks import sources
from prune_env.tasks.images import Split, stratified_order
from prune_env.tasks.normalisation import CIFAR, IMAGENET, Normalisation, parse
from prune_env.tasks.sources import Labelled, Source


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is read.

    Attributes:
        classes: Number of classes; 0 where only the files tell.
        channels: Channels of an image.
        normalise: Its own mean and standard deviation.
        search: Images held out of the training part, at most a quarter of it.
        crop: Pixels of padding for random crops in training.
        flip: Whether a mirrored image still shows its class.
        loader: Name in `torchvision.datasets` that can download it.
        produces: What the download leaves in the data root.
        side: Side to which files are scaled; 0 where images have one size.
    """

    classes: int
    channels: int
    normalise: Normalisation
    search: int = 2000
    crop: int = 4
    flip: bool = True
    loader: str = ""
    produces: str = ""
    side: int = 0


CIFAR100 = Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

DATASETS = {
    "digits": Dataset(10, 1, Normalisation((0.3053,), (0.3760,)), search=300, crop=1, flip=False),
    "fashion-mnist": Dataset(
        10, 1, Normalisation((0.2860,), (0.3530,)), crop=2, loader="FashionMNIST", produces="FashionMNIST/raw"
    ),
    "cifar10": Dataset(10, 3, CIFAR, loader="CIFAR10", produces="cifar-10-batches-py"),
    "cifar100": Dataset(100, 3, CIFAR100, loader="CIFAR100", produces="cifar-100-python"),
    "imagefolder": Dataset(0, 3, IMAGENET, side=224, crop=16),
    "imagenet": Dataset(0, 3, IMAGENET, search=5000, side=224, crop=16),
}
"""Name -> data set. A folder of that name holds `imagefolder` and `imagenet`."""


@dataclass(frozen=True, eq=False)
class Splits:
    """Training, search and test split of a data set, disjoint.

    The search split is held out of the training part; learning and searching see nothing beyond it.
    """

    train: Split
    search: Split
    test: Split


def find_dataset(name: str) -> Dataset:
    """The table's entry.

    Raises:
        ValueError: An unknown name; names the closest.
    """
    if name not in DATASETS:
        raise ValueError(f"data set is {name!r}; {did_you_mean(name, DATASETS)}allowed are {', '.join(DATASETS)}")
    return DATASETS[name]


def cache_root() -> Path:
    """The project's folder in the user's cache, `$XDG_CACHE_HOME/prune_env` or `~/.cache/prune_env`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prune_env"


def data_root() -> Path:
    """Where data sets are found: `$PRUNE_ENV_DATA`, else the user's cache."""
    named = os.environ.get("PRUNE_ENV_DATA")
    return Path(named).expanduser() if named else cache_root()


def load_splits(
    name: str,
    *,
    seed: int,
    root: Path | str | None = None,
    normalise: str | None = None,
    search_size: int | None = None,
    image_size: int | None = None,
) -> Splits:
    """Read a data set and split it.

    It is looked for in the data root as `NAME.npz` with `x_train, y_train, x_test, y_test`, then as torchvision lays
    it out, and is otherwise downloaded by torchvision. `digits` comes with scikit-learn.

    Args:
        name: A name of `DATASETS`.
        seed: Draws the search split and the order of the images; the test split is the same for every seed.
        root: The data root; None takes `data_root()`.
        normalise: A name or numbers as `normalisation.parse` reads them; None takes the data set's own.
        search_size: Images of the search split; None takes the table's.
        image_size: Side to which image files are scaled; only for data sets of files.

    Raises:
        ValueError: An unknown name, corrupt files, or a value that is not allowed.
        FileNotFoundError: The files are neither there nor to be had; says which file to put where.
    """
    entry = find_dataset(name)
    if image_size is not None and not entry.side:
        raise ValueError(f"image_size is {image_size}; images of {name} have one size: only None is allowed")
    source, classes = _read(name, Path(root).expanduser() if root else data_root(), image_size or entry.side)
    normalisation = parse(normalise or str(entry.normalise), channels=entry.channels)
    size = _search_size(search_size, entry.search, len(source.train.labels), classes)
    order, last = stratified_order(source.train.labels, seed), stratified_order(source.test.labels, seed)

    def split(part: Labelled, indices: np.ndarray) -> Split:
        labels = torch.from_numpy(part.labels[indices])
        return Split(part.images, torch.from_numpy(indices), labels, classes, normalisation)

    return Splits(split(source.train, order[size:]), split(source.train, order[:size]), split(source.test, last))


def _search_size(asked: int | None, default: int, images: int, classes: int) -> int:
    most = images - classes
    if asked is None:
        return min(default, images // 4)
    if not 1 <= asked <= most:
        raise ValueError(f"search_size is {asked}; 1 to {most} is allowed for {images} training images")
    return asked


@functools.lru_cache(maxsize=2)
def _read(name: str, root: Path, side: int) -> tuple[Source, int]:
    """Source and number of classes; remembered, because unpacking an archive takes seconds."""
    entry = DATASETS[name]
    if name == "digits":
        return sources.read_digits(), entry.classes
    if entry.side:
        return sources.read_folder(root / name, size=side)
    archive = root / f"{name}.npz"
    if archive.exists():
        return sources.read_npz(archive, classes=entry.classes, channels=entry.channels), entry.classes
    return _torchvision(name, entry, root), entry.classes


def _torchvision(name: str, entry: Dataset, root: Path) -> Source:
    """A data set as torchvision lays it out, downloaded where it is absent."""
    import torchvision.datasets

    loader = getattr(torchvision.datasets, entry.loader)
    if not (root / entry.produces).is_dir():
        try:
            sources.download(loader, root, produces=entry.produces)
        except OSError as error:
            raise FileNotFoundError(
                f"{name} is not in {root} and cannot be downloaded ({error}): put {root / (name + '.npz')} (x_train, "
                f"y_train, x_test, y_test) or torchvision's {root / entry.produces} there, or set PRUNE_ENV_DATA"
            ) from error
    if name == "fashion-mnist":
        return sources.read_idx(root / entry.produces, classes=entry.classes)
    return sources.read_torchvision(loader, root)
