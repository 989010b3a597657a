"""Networks: shapes, key names, sizes, and weights that do not fit."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from prune_env.tasks.networks import NETWORKS, make_network
from prune_env.tasks.resnet import ZeroPadShortcut
from prune_env.tasks.weights import load_weights, read_tensors, write_tensors

SIZES = {
    "cnn": 19_762,
    "lenet300100": 266_610,
    "m-cifarnet": 1_296_074,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "vgg16_bn": 14_724_042,
    "wrn-40-4": 8_949_210,
}
"""Parameters for 10 classes, on the images each is for; the residual ones as published (.27 to 1.7 M, 8.9 M)."""


def images_for(name):
    return (1, 8) if name == "cnn" else (1, 28) if name == "lenet300100" else (3, 32)


def build(name, classes=10):
    channels, side = images_for(name)
    return make_network(name, classes=classes, channels=channels, side=side), torch.rand(2, channels, side, side)


def with_keywords(num_classes, in_channels=3):
    return nn.Linear(in_channels, num_classes)


def with_open_keywords(**kwargs):
    return nn.Linear(4, kwargs["num_classes"])


def not_a_network():
    return 3


def unusable(width):
    return nn.Linear(width, width)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_one_logit_per_class(name):
    network, images = build(name, classes=7)
    assert not network.training
    with torch.inference_mode():
        assert network(images).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_parameters_it_should(name):
    network, _ = build(name)
    assert sum(p.numel() for p in network.parameters()) == SIZES[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_made_of_importable_classes_without_lambdas(name):
    network, _ = build(name)
    for module in network.modules():
        assert "<" not in type(module).__qualname__
        attributes = [v for k, v in vars(module).items() if not k.startswith("_")]
        assert not any(callable(value) for value in attributes)


@pytest.mark.parametrize("side", [6, 7])
def test_the_shortcut_is_a_slice_whose_gradient_stays_channels_last(side):
    x = torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ZeroPadShortcut(2)(x)
    assert torch.equal(y[:, 2:-2], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, -2:].any()
    # 1 * x, because the gradient of a leaf takes the leaf's layout
    inner = 1 * x
    (gradient,) = torch.autograd.grad(ZeroPadShortcut(2)(inner).sum(), inner)
    assert gradient.sum() == gradient[:, :, ::2, ::2].numel()
    assert gradient[:, :, ::2, ::2].all()
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_the_resnet_has_the_key_names_of_published_weights():
    keys = set(make_network("resnet20", classes=10).state_dict())
    norms = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn1.{n}" for n in norms}
    for block in (f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)):
        expected |= {f"{block}.conv{j}.weight" for j in (1, 2)} | {f"{block}.bn{j}.{n}" for j in (1, 2) for n in norms}
    assert keys == expected


def test_the_lenet_has_the_key_names_of_published_weights():
    keys = set(make_network("lenet300100", classes=10, channels=1, side=28).state_dict())
    assert keys == {f"ip{i}.{n}" for i in (1, 2, 3) for n in ("weight", "bias")}


def test_the_zero_pad_shortcut_takes_every_second_pixel_between_zero_channels():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    out = ZeroPadShortcut(1)(x)
    assert out.shape == (1, 4, 2, 2)
    assert out[0, 1].tolist() == [[0.0, 2.0], [8.0, 10.0]]
    assert out[0, 2].tolist() == [[16.0, 18.0], [24.0, 26.0]]
    assert out[0, 0].abs().sum() == out[0, 3].abs().sum() == 0


def test_the_seed_decides_the_weights_and_leaves_the_global_rng_alone():
    state = torch.get_rng_state()
    one, same, other = (
        make_network("cnn", classes=10, channels=1, side=8, seed=seed).stem[0].weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "torchvision:googlenet"])
def test_a_network_of_torchvision_gives_plain_logits(name):
    network = make_network(name, classes=5, side=64)
    with torch.inference_mode():
        assert network(torch.rand(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("factory", ["with_keywords", "with_open_keywords"])
def test_a_factory_is_given_the_classes(factory):
    network = make_network(f"{__name__}:{factory}", classes=6)
    assert network.out_features == 6


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnt20", "did you mean 'resnet20'"),
        ("torchvision:resnt18", "did you mean 'torchvision:resnet18'"),
        ("no.such.module:f", "cannot be imported"),
        ("math:nothing", "cannot be imported"),
        (":f", "cannot be imported"),
        ("math:pi", "no callable"),
        (f"{__name__}:not_a_network", r"returned int, not a torch\.nn\.Module"),
        (f"{__name__}:unusable", "cannot be called"),
    ],
)
def test_a_network_that_cannot_be_made_is_refused(name, match):
    with pytest.raises(ValueError, match=match):
        make_network(name, classes=10)


def test_images_that_do_not_suit_the_network_are_refused():
    with pytest.raises(ValueError, match="at least 32 pixels"):
        make_network("vgg16_bn", classes=10, side=28)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        make_network("torchvision:resnet18", classes=10, channels=1)


@pytest.mark.parametrize("form", ["safetensors", "state dict", "nested", "data parallel", "without counters"])
def test_weights_load_from_every_form_in_use(tmp_path, form):
    source, images = build("cnn")
    tensors = source.state_dict()
    path = tmp_path / "weights.pth"
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        write_tensors(tensors, path)
    elif form == "state dict":
        torch.save(tensors, path)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": tensors}, path)
    elif form == "data parallel":
        torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, path)
    else:
        torch.save({name: value for name, value in tensors.items() if "num_batches" not in name}, path)
    network = make_network("cnn", classes=10, channels=1, side=8, seed=9)
    load_weights(network, path)
    with torch.inference_mode():
        assert torch.equal(network(images), source(images))


def damaged(tensors, how):
    name = "stem.0.weight"
    if how == "shape":
        return {**tensors, name: tensors[name][:5].clone()}
    if how == "missing":
        return {key: value for key, value in tensors.items() if key != name}
    if how == "extra":
        return {**tensors, "more": torch.zeros(1)}
    return {**tensors, name: tensors[name] * float(how)}


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("shape", r"stem\.0\.weight has shape \(5, 1, 3, 3\), not \(16, 1, 3, 3\)"),
        ("missing", r"stem\.0\.weight is missing"),
        ("extra", "more is not in the network"),
        ("nan", r"NaN or Inf in stem\.0\.weight"),
        ("inf", r"NaN or Inf in stem\.0\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, how, match):
    network, _ = build("cnn")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(damaged(before, how), path)
    with pytest.raises(ValueError, match=match):
        load_weights(network, path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_weights_file_is_refused_by_its_name(tmp_path, suffix, share):
    path = tmp_path / f"w.{suffix}"
    tensors = build("cnn")[0].state_dict()
    if suffix == "pth":
        torch.save(tensors, path)
    else:
        write_tensors(tensors, path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ValueError, match=rf"w\.{suffix} is truncated, corrupt"):
        read_tensors(path)


def test_a_file_of_something_else_is_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "dict.pth")
    for name in ("list.pth", "dict.pth"):
        with pytest.raises(ValueError, match="holds no state dict"):
            read_tensors(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_tensors(tmp_path / "none.pth")


def test_a_pickled_network_is_not_unpickled(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "network.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_tensors(tmp_path / "network.pth")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_tensors({"a": torch.zeros(2)}, path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors({"a": torch.ones(2)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert read_tensors(path)["a"].tolist() == [0, 0]
