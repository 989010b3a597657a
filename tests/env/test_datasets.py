"""Data sets: layouts, splits, and what happens when the files are not what they should be."""

from __future__ import annotations

import gzip
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prune_env.tasks import datasets
from prune_env.tasks.datasets import DATASETS, load_splits
from prune_env.tasks.images import stratified_order
from prune_env.tasks.normalisation import NORMALISATIONS, Normalisation, parse


def arrays(train=200, test=60, side=32, seed=0):
    rng = np.random.default_rng(seed)
    shape = (side, side, 3)
    return {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train, dtype=np.uint8) % 10,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test, dtype=np.uint8) % 10,
    }


def write_npz(root, **changes):
    content = {**arrays(), **changes}
    np.savez(root / "cifar10.npz", **{name: value for name, value in content.items() if value is not None})
    return root


def write_idx(folder, *, packed):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 100), ("t10k", 30)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = b"\x00\x00\x08\x03" + np.array(images.shape, ">u4").tobytes()
        labels = b"\x00\x00\x08\x01" + np.array([count], ">u4").tobytes() + bytes(i % 10 for i in range(count))
        for name, raw in (("images-idx3", header + images.tobytes()), ("labels-idx1", labels)):
            path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(raw) if packed else raw)


def write_folder(root, classes=("ant", "bee"), count=12):
    for part in ("train", "val"):
        for value, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 50), (value * 200, i, 0)).save(root / part / name / f"{i}.png")
    (root / "train" / classes[0] / "notes.txt").write_text("not an image")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_digits_split_into_disjoint_parts_that_cover_the_data_set():
    splits = load_splits("digits", seed=0)
    assert (len(splits.train), len(splits.search), len(splits.test)) == (1137, 300, 360)
    assert not set(splits.train.indices.tolist()) & set(splits.search.indices.tolist())
    assert splits.train.classes == 10
    assert splits.train.shape == (1, 8, 8)


def test_the_seed_draws_the_search_split_but_never_the_test_images():
    one, same, other = (load_splits("digits", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.search.indices, same.search.indices)
    assert set(one.search.indices.tolist()) != set(other.search.indices.tolist())
    assert set(one.test.indices.tolist()) == set(other.test.indices.tolist())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 10))
def test_every_prefix_of_a_stratified_order_holds_the_classes_in_proportion(values, seed):
    labels = np.array(values)
    order = stratified_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for value in np.unique(labels):
        share = (labels == value).mean()
        running = np.cumsum(labels[order] == value)
        bound = len(np.unique(labels)) + 1
        assert np.abs(running - share * np.arange(1, len(labels) + 1)).max() <= bound


def test_digits_are_normalised_to_mean_zero_and_deviation_one():
    images, labels = load_splits("digits", seed=0).train.take(10_000)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert abs(images.mean().item()) < 0.02
    assert abs(images.std().item() - 1) < 0.02


def test_normalisation_is_pixels_in_the_unit_interval_minus_mean_by_deviation():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    result = Normalisation((0.5, 0.1, 0.0), (0.5, 0.2, 2.0))(pixels)
    assert result.flatten().tolist() == pytest.approx([-1.0, 0.5, 0.5])


def test_a_normalisation_survives_being_written_as_numbers():
    for entry in NORMALISATIONS.values():
        assert parse(str(entry), channels=len(entry.mean)) == entry


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("imagnet", "did you mean 'imagenet'"),
        ("1,2,3", "allowed are"),
        ("", "allowed are"),
        ("0,0,0,1,1,0", "std > 0"),
        ("nan,1", "finite"),
        ("0,0,1,1", "2 channels"),
    ],
)
def test_a_normalisation_that_makes_no_sense_is_refused(text, match):
    with pytest.raises(ValueError, match=match):
        parse(text, channels=3)


def test_batches_and_take_give_the_same_images_in_the_same_order():
    split = load_splits("digits", seed=0).search
    images, labels = split.take(70)
    batches = list(split.batches(64))
    assert [len(y) for _, y in batches] == [64, 64, 64, 64, 44]
    assert torch.equal(torch.cat([x for x, _ in batches])[:70], images)
    assert torch.equal(torch.cat([y for _, y in batches])[:70], labels)


def test_images_handed_out_are_copies():
    split = load_splits("digits", seed=0).test
    images, labels = split.take(3)
    images.zero_()
    labels.zero_()
    assert split.take(3)[0].abs().sum() > 0
    assert split.take(3)[1].sum() > 0


@pytest.mark.parametrize("count", [0, -1])
def test_no_images_are_refused(count):
    split = load_splits("digits", seed=0).test
    with pytest.raises(ValueError, match="count is"):
        split.take(count)
    with pytest.raises(ValueError, match="batch_size is"):
        next(split.batches(count))


def test_an_archive_is_read_as_it_was_written(tmp_path):
    content = arrays()
    splits = load_splits("cifar10", seed=3, root=write_npz(tmp_path), normalise="none", search_size=40)
    assert (len(splits.train), len(splits.search), len(splits.test)) == (160, 40, 60)
    images, labels = splits.search.take(40)
    for image, label, index in zip(images, labels, splits.search.indices, strict=True):
        assert torch.equal((image * 255).round().byte().permute(1, 2, 0), torch.tensor(content["x_train"][index]))
        assert label == content["y_train"][index]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.zeros((200, 32, 32, 3), np.float32)}, "float32, not uint8"),
        ({"x_train": np.zeros((200, 32, 32), np.uint8)}, "1 channels, not 3"),
        ({"x_train": np.zeros((200, 3, 32, 32), np.uint8)}, "have shape"),
        ({"x_test": np.zeros((60, 28, 28, 3), np.uint8)}, "test images"),
        ({"y_train": np.zeros(7, np.int64)}, "not 200 integers"),
        ({"y_train": np.full(200, 10)}, "not from 0 to 9"),
        ({"y_train": np.array([None] * 200)}, "allow_pickle=False"),
    ],
)
def test_an_archive_with_wrong_content_is_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        load_splits("cifar10", seed=0, root=write_npz(tmp_path, **changes))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_a_corrupt_archive_is_refused_by_its_name(tmp_path, damage):
    np.savez_compressed(tmp_path / "cifar10.npz", **arrays())
    raw = (tmp_path / "cifar10.npz").read_bytes()
    middle = len(raw) // 3
    broken = {
        "truncated": raw[: len(raw) // 2],
        "empty": b"",
        "text": b"hello",
        "flipped": raw[:middle] + bytes(64) + raw[middle + 64 :],
    }[damage]
    (tmp_path / "cifar10.npz").write_bytes(broken)
    with pytest.raises(ValueError, match=r"cifar10\.npz cannot be used"):
        load_splits("cifar10", seed=0, root=tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_from_the_four_raw_files(tmp_path, packed):
    write_idx(tmp_path / "FashionMNIST" / "raw", packed=packed)
    splits = load_splits("fashion-mnist", seed=0, root=tmp_path)
    assert splits.train.shape == (1, 28, 28)
    assert len(splits.train) + len(splits.search) == 100
    assert splits.test.labels.bincount().tolist() == [3] * 10


@pytest.mark.parametrize("damage", ["truncated", "absent", "short"])
def test_broken_raw_files_are_refused(tmp_path, damage):
    folder = tmp_path / "FashionMNIST" / "raw"
    write_idx(folder, packed=damage != "short")
    if damage == "truncated":
        path = folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "short":
        path = folder / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="ubyte"):
        load_splits("fashion-mnist", seed=0, root=tmp_path)


def test_a_folder_of_images_is_decoded_when_asked_for(tmp_path):
    write_folder(tmp_path / "imagefolder")
    splits = load_splits("imagefolder", seed=0, root=tmp_path, normalise="none", image_size=16)
    assert splits.train.classes == 2
    assert (len(splits.train), len(splits.search), len(splits.test)) == (18, 6, 24)
    images, labels = splits.test.take(24)
    assert images.shape == (24, 3, 16, 16)
    assert torch.equal((images[:, 0].mean((1, 2)) > 0.5).long(), labels)


def test_a_broken_image_file_is_named(tmp_path):
    write_folder(tmp_path / "imagefolder")
    (tmp_path / "imagefolder" / "val" / "bee" / "3.png").write_bytes(b"\x89PNG broken")
    splits = load_splits("imagefolder", seed=0, root=tmp_path, image_size=16)
    with pytest.raises(ValueError, match=r"3\.png is no readable image"):
        splits.test.take(100)


def test_an_image_folder_without_images_says_where_they_belong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images belong in .*train/<class>/"):
        load_splits("imagefolder", seed=0, root=tmp_path)
    write_folder(tmp_path / "imagefolder")
    (tmp_path / "imagefolder" / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match="lacks: cat"):
        load_splits("imagefolder", seed=0, root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_missing_files_without_a_network_name_the_file_to_put_where(tmp_path, offline, name):
    root = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=rf"put {root}/{name}\.npz .*PRUNE_ENV_DATA"):
        load_splits(name, seed=0, root=root)
    assert list(root.iterdir()) == []


def test_corrupt_batches_of_torchvision_are_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"no")
    with pytest.raises(ValueError, match="cifar-10-batches-py is corrupt"):
        load_splits("cifar10", seed=0, root=tmp_path)


def test_an_unknown_data_set_names_the_closest():
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        load_splits("cifar-10", seed=0)


@pytest.mark.parametrize("size", [0, -1, 1437])
def test_a_search_split_that_leaves_no_training_images_is_refused(size):
    with pytest.raises(ValueError, match="search_size is"):
        load_splits("digits", seed=0, search_size=size)


def test_images_of_one_size_cannot_be_scaled():
    with pytest.raises(ValueError, match="image_size is 16"):
        load_splits("digits", seed=0, image_size=16)


def test_the_data_root_is_the_variable_or_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNE_ENV_DATA", str(tmp_path / "named"))
    assert datasets.data_root() == tmp_path / "named"
    monkeypatch.delenv("PRUNE_ENV_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert datasets.data_root() == tmp_path / "cache" / "prune_env"


@pytest.mark.parametrize("name", DATASETS)
def test_every_table_entry_has_a_normalisation_of_its_channels(name):
    entry = DATASETS[name]
    assert len(entry.normalise.mean) == entry.channels
