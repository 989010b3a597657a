"""Tasks: a name becomes a network with its data, again and again the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prune_env.tasks import dense
from prune_env.tasks.dense import blank, parse_name, train_dense
from prune_env.tasks.task import make_task
from prune_env.tasks.training.__main__ import accuracy
from prune_env.tasks.weights import write_tensors


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNE_ENV_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def logits(task):
    with torch.inference_mode():
        return task.network(task.search.take(20)[0])


def test_a_task_has_everything_a_search_needs():
    task = make_task("digits-cnn", epochs=0)
    assert (task.name, task.data, task.network_name, task.classes) == ("digits-cnn", "digits", "cnn", 10)
    assert task.example.shape == (1, 1, 8, 8)
    assert not task.network.training
    assert task.weights is None
    assert torch.equal(task.calibration(30)[0], task.train.take(30)[0])


def test_a_network_is_trained_once_and_then_loaded(tmp_path):
    steps = []
    first = make_task("digits-cnn", epochs=1, progress=lambda done, total, note: steps.append(done))
    assert len(steps) == 1137 // 64
    again = make_task("digits-cnn", epochs=1, progress=lambda done, total, note: steps.append(done))
    assert len(steps) == 1137 // 64
    assert torch.equal(logits(first), logits(again))
    (folder,) = (tmp_path / "data" / "dense").iterdir()
    assert first.weights == again.weights == str(folder / "model.safetensors")
    record = json.loads((folder / "settings.json").read_text())
    assert record["training"]["epochs"] == 1
    assert len(record["report"]["losses"]) == 1


def test_a_training_may_start_from_weights_of_a_file(tmp_path):
    trained = make_task("digits-cnn", epochs=1)
    file = tmp_path / "start.safetensors"
    shutil.copy(trained.weights, file)
    start = blank("digits-cnn", start=file, epochs=1, lr=1e-9)
    made = train_dense(start)
    # a rate that moves nothing: what is left are the weights that it started from
    for own, given in zip(start.network.parameters(), trained.network.parameters(), strict=True):
        torch.testing.assert_close(own, given)
    # another start, or none, is another network; without one the place is that of older versions
    assert len(json.loads((made.parent / "settings.json").read_text())["start"]) == 12
    write_tensors(start.network.state_dict(), file)
    folders = [blank("digits-cnn", start=given, epochs=1, lr=1e-9).settings.folder(Path()) for given in (file, None)]
    assert len({made.parent.name, *(folder.name for folder in folders)}) == 3
    assert blank("digits-cnn").settings.folder(Path()).name == "digits-cnn-4856f4dcf32e"
    with pytest.raises(ValueError, match=r"start\.safetensors does not fit"):
        blank("digits-lenet300100", start=file)


@pytest.mark.parametrize("changes", [{"epochs": 2}, {"seed": 1}, {"normalise": "half"}, {"search_size": 200}])
def test_other_settings_are_another_network(changes):
    usual = {"epochs": 1}
    assert make_task("digits-cnn", **usual).weights != make_task("digits-cnn", **{**usual, **changes}).weights


def test_the_settings_of_a_task_are_json_and_make_it_again(tmp_path):
    write_tensors(make_task("digits-cnn", epochs=0, seed=4).network.state_dict(), tmp_path / "w.safetensors")
    made = [
        make_task("digits", network="cnn", epochs=1, seed=3, search_size=100),
        make_task("digits-cnn", weights=tmp_path / "w.safetensors", normalise="half"),
        make_task("digits-lenet300100", epochs=0),
    ]
    for task in made:
        again = make_task(**json.loads(json.dumps(task.settings)))
        assert (again.name, again.weights, again.normalise) == (task.name, task.weights, task.normalise)
        assert torch.equal(again.search.indices, task.search.indices)
        assert torch.equal(logits(again), logits(task))


def test_the_normalisation_is_the_networks_if_it_suits_the_images_else_the_datas():
    assert dense._normalise_text(None, "cifar10", "resnet20").startswith("0.485,")
    assert dense._normalise_text(None, "cifar10", "m-cifarnet").startswith("0.4914,")
    assert dense._normalise_text(None, "fashion-mnist", "lenet300100") == "0.5,0.5"
    assert dense._normalise_text(None, "fashion-mnist", "resnet20").startswith("0.286,")
    assert dense._normalise_text("none", "cifar10", "resnet20") == "0.0,0.0,0.0,1.0,1.0,1.0"


@pytest.mark.parametrize(
    ("name", "network", "expected"),
    [
        ("digits-cnn", None, ("digits", "cnn")),
        ("fashion-mnist-lenet300100", None, ("fashion-mnist", "lenet300100")),
        ("cifar10-m-cifarnet", None, ("cifar10", "m-cifarnet")),
        ("cifar100-wrn-40-4", None, ("cifar100", "wrn-40-4")),
        ("imagenet-torchvision:resnet18", None, ("imagenet", "torchvision:resnet18")),
        ("cifar10", "my.package:factory", ("cifar10", "my.package:factory")),
        ("cifar10-resnet20", "resnet56", ("cifar10", "resnet56")),
    ],
)
def test_a_name_is_data_and_network(name, network, expected):
    assert parse_name(name, network) == expected


@pytest.mark.parametrize(
    ("name", "network", "match"),
    [
        ("cifr10-resnet20", None, "did you mean 'cifar10-resnet20'"),
        ("cifar10-resnt20", None, "did you mean 'cifar10-resnet20'|did you mean 'resnet20'"),
        ("cifar10-resnet20", "resnt56", "did you mean 'resnet56'"),
        ("cifar", "resnet20", "did you mean 'cifar10'"),
        ("digits", None, "<data>-<network>"),
        ("", None, "<data>-<network>"),
    ],
)
def test_a_name_that_is_not_known_names_the_closest(name, network, match):
    with pytest.raises(ValueError, match=match):
        make_task(name, network=network)


def test_weights_that_do_not_fit_or_do_not_exist_leave_nothing_behind(tmp_path):
    other = make_task("digits-lenet300100", epochs=0)
    write_tensors(other.network.state_dict(), tmp_path / "lenet.safetensors")
    with pytest.raises(ValueError, match=r"lenet\.safetensors does not fit"):
        make_task("digits-cnn", weights=tmp_path / "lenet.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        make_task("digits-cnn", weights=tmp_path / "none.safetensors")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("epochs", -1)])
def test_negative_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        make_task("digits-cnn", **{name: value})


def test_a_read_only_data_root_leaves_the_cache_to_the_user(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    root.chmod(0o555)
    assert dense.writable_root(root) == tmp_path / "cache" / "prune_env"
    root.chmod(0o755)
    assert dense.writable_root(root) == root
    assert dense.writable_root(root / "new" / "folder") == root / "new" / "folder"


def test_a_corrupt_cached_network_is_named(tmp_path):
    task = make_task("digits-cnn", epochs=1)
    file = tmp_path / "data" / "dense"
    (path,) = file.glob("*/model.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{task.weights} is truncated"):
        make_task("digits-cnn", epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("cifar10-resnet20", "cifar10_resnet20", 0.9173),
        ("cifar10-resnet56", "cifar10_resnet56", 0.9339),
        ("cifar10-m-cifarnet", "cifar10_m_cifarnet", 0.9194),
    ],
)
def test_published_weights_reach_their_accuracy(data_root, weights_root, name, file, expected):
    task = make_task(name, weights=weights_root / f"{file}.safetensors", root=data_root)
    assert accuracy(task.network, task.test) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_digits_network_is_good_for_every_seed(seed):
    task = make_task("digits-cnn", seed=seed)
    assert accuracy(task.network, task.test) >= 0.975
