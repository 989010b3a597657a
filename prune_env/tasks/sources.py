"""Sources: the file layouts a data set may come in, each read into arrays or file lists and checked on the way."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image

from prune_env.tasks.images import ArrayImages, FileImages, Images, stratified_order

DOWNLOAD_TIMEOUT_S = 20.0
"""Longest wait for a silent server."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images and the class of each."""

    images: Images
    labels: Int64[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as it is stored: training and test part."""

    train: Labelled
    test: Labelled


def read_digits() -> Source:
    """The 1,797 grey 8x8 digits of scikit-learn; one in five, the same for every seed, is the test part."""
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)
    pixels = np.round(np.reshape(values, (-1, 8, 8)) * (255 / 16)).astype(np.uint8)
    labels = np.asarray(targets, np.int64)
    order = stratified_order(labels, seed=0)
    test, train = order[:360], order[360:]
    return Source(_labelled(pixels[train], labels[train]), _labelled(pixels[test], labels[test]))


def read_npz(path: Path, *, classes: int, channels: int) -> Source:
    """An archive with `x_train, y_train, x_test, y_test`; images uint8, NHWC, or NHW where they are grey.

    Raises:
        ValueError: The file is corrupt, lacks an array, or an array does not have the shape, type or range it should.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            x_train, y_train, x_test, y_test = (archive[name] for name in names)
        train = _labelled(_checked(x_train, channels), _labels(y_train, len(x_train), classes))
        test = _labelled(_checked(x_test, channels), _labels(y_test, len(x_test), classes))
        if train.images.shape() != test.images.shape():
            raise ValueError(f"training images are {train.images.shape()}, test images {test.images.shape()}")
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise ValueError(f"{path} cannot be used as a data set: {error}") from error
    return Source(train, test)


def read_idx(folder: Path, *, classes: int) -> Source:
    """The four `*-ubyte` files of MNIST and its relatives, packed with gzip or not.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is corrupt.
    """
    parts = []
    for part in ("train", "t10k"):
        images = _idx(folder / f"{part}-images-idx3-ubyte", dimensions=3)
        labels = _idx(folder / f"{part}-labels-idx1-ubyte", dimensions=1)
        try:
            parts.append(_labelled(_checked(images, 1), _labels(labels, len(images), classes)))
        except ValueError as error:
            raise ValueError(f"{folder} cannot be used as a data set: {error}") from error
    return Source(*parts)


def read_torchvision(loader: Callable, root: Path) -> Source:
    """A data set of torchvision's that is a class of (root, train, download), from its own files in `root`.

    Raises:
        ValueError: The files are there but corrupt.
    """
    parts = []
    for train in (True, False):
        try:
            data = loader(str(root), train=train, download=False)
        except (RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
            raise ValueError(f"{root / loader.base_folder} is corrupt or incomplete: {error}") from error
        parts.append(_labelled(np.asarray(data.data), np.asarray(data.targets, np.int64)))
    return Source(*parts)


def download(loader: Callable, root: Path, *, produces: str) -> None:
    """Let torchvision download a data set; `root / produces` is there afterwards, whole, or nothing is.

    Raises:
        OSError: No connection, a wrong checksum, or no room on the disk.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder, _silence_limit():
        try:
            loader(folder, train=True, download=True)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        shutil.rmtree(root / produces, ignore_errors=True)
        (root / produces).parent.mkdir(parents=True, exist_ok=True)
        os.replace(Path(folder) / produces, root / produces)


def read_folder(root: Path, *, size: int) -> tuple[Source, int]:
    """Image files in `root/{train,val}/<class>/`, and the number of classes.

    Raises:
        FileNotFoundError: A folder is missing or holds no image.
        ValueError: `val` has a class that `train` lacks.
    """
    if size < 1:
        raise ValueError(f"image_size is {size}; at least 1 is allowed")
    names = _class_names(root / "train")
    unknown = sorted(set(_class_names(root / "val")) - set(names))
    if unknown:
        raise ValueError(f"{root / 'val'} has classes that {root / 'train'} lacks: {', '.join(unknown[:5])}")
    return Source(_folder(root / "train", names, size), _folder(root / "val", names, size)), len(names)


def _labelled(pixels: np.ndarray, labels: Int64[np.ndarray, " n"]) -> Labelled:
    """In-memory images; NHWC stays so in memory, which is channels last."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    tensor = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    return Labelled(ArrayImages(tensor), labels)


def _checked(pixels: np.ndarray, channels: int) -> UInt8[np.ndarray, "image ..."]:
    shape = pixels.shape
    if pixels.dtype != np.uint8:
        raise ValueError(f"images are {pixels.dtype}, not uint8")
    if len(shape) not in (3, 4) or 0 in shape or shape[1] != shape[2]:
        raise ValueError(f"images have shape {shape}, not (images, side, side, {channels})")
    found = shape[3] if len(shape) == 4 else 1
    if found != channels:
        raise ValueError(f"images have {found} channels, not {channels}")
    return pixels


def _labels(labels: np.ndarray, count: int, classes: int) -> Int64[np.ndarray, " n"]:
    if labels.size != count or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}, not {count} integers")
    labels = labels.reshape(-1).astype(np.int64)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, not from 0 to {classes - 1}")
    return labels


def _idx(path: Path, *, dimensions: int) -> np.ndarray:
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        raise FileNotFoundError(f"{path} (or {packed.name}) is missing")
    try:
        raw = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{packed} is corrupt: {error}") from error
    header = 4 + 4 * dimensions
    shape = np.frombuffer(raw[4:header].ljust(4 * dimensions, b"\0"), ">u4").astype(np.int64)
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) != header + shape.prod():
        raise ValueError(f"{path} is corrupt: {len(raw)} bytes do not hold bytes of shape {tuple(shape.tolist())}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _class_names(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(f"{folder} has no class folders: images belong in {folder}/<class>/")
    return names


def _folder(folder: Path, names: list[str], size: int) -> Labelled:
    Image.init()
    paths, labels = [], []
    for label, name in enumerate(names):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in Image.EXTENSION)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no image files")
    return Labelled(FileImages(tuple(paths), size), np.asarray(labels, np.int64))


@contextmanager
def _silence_limit() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
