"""Networks by name: the zoo, `torchvision:NAME`, and `package.module:factory` for any other."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from prune_env.checks import did_you_mean
from prune_env.tasks.convnets import DigitsCnn, LeNet300100, MCifarNet, VggBn
from prune_env.tasks.resnet import CifarResNet, WideResNet


@dataclass(frozen=True)
class ImageShape:
    """What a network is built for."""

    classes: int
    channels: int
    side: int


@dataclass(frozen=True)
class NetworkEntry:
    """One network of the zoo.

    Attributes:
        build: Makes it, with random weights.
        lr: Peak learning rate of its dense training.
        normalise: Normalisation it is used with; None leaves that to the data set.
        least_side: Smallest image it takes.
    """

    build: Callable[[ImageShape], nn.Module]
    lr: float = 0.2
    normalise: str | None = None
    least_side: int = 1


def _resnet(blocks: int) -> NetworkEntry:
    """A CIFAR ResNet; its published weights expect the normalisation of ImageNet."""
    return NetworkEntry(
        lambda s: CifarResNet(blocks, classes=s.classes, channels=s.channels), normalise="imagenet", least_side=4
    )


NETWORKS = {
    "cnn": NetworkEntry(lambda s: DigitsCnn(classes=s.classes, channels=s.channels)),
    "lenet300100": NetworkEntry(
        lambda s: LeNet300100(s.channels * s.side**2, classes=s.classes), lr=0.05, normalise="half"
    ),
    "m-cifarnet": NetworkEntry(
        lambda s: MCifarNet(classes=s.classes, channels=s.channels), normalise="cifar", least_side=5
    ),
    "resnet20": _resnet(3),
    "resnet32": _resnet(5),
    "resnet44": _resnet(7),
    "resnet56": _resnet(9),
    "resnet110": _resnet(18),
    "vgg16_bn": NetworkEntry(lambda s: VggBn(classes=s.classes, channels=s.channels), lr=0.1, least_side=32),
    "wrn-40-4": NetworkEntry(lambda s: WideResNet(40, 4, classes=s.classes, channels=s.channels), lr=0.1),
}
"""Name -> network."""

TORCHVISION_OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
"""Constructor arguments for torchvision's networks that would otherwise return more than logits."""


def check_network(name: str) -> None:
    """Check that a name is one of the table's or of the two open forms.

    Raises:
        ValueError: It is neither; names the closest.
    """
    if name in NETWORKS or ":" in name:
        return
    raise ValueError(
        f"network is {name!r}; {did_you_mean(name, NETWORKS)}allowed are {', '.join(NETWORKS)}, torchvision:NAME and "
        "package.module:factory"
    )


def find_network(name: str) -> NetworkEntry:
    """The table's entry, or one made for a name of the open forms.

    Raises:
        ValueError: An unknown name; names the closest.
    """
    check_network(name)
    if name in NETWORKS:
        return NETWORKS[name]
    if name.startswith("torchvision:"):
        return NetworkEntry(lambda shape: _torchvision(name, shape), lr=0.1, normalise="imagenet")
    return NetworkEntry(lambda shape: _factory(name, shape), lr=0.1)


def make_network(name: str, *, classes: int, channels: int = 3, side: int = 32, seed: int = 0) -> nn.Module:
    """A network with random weights, in eval mode; nothing is downloaded and the global RNG is left as it was.

    Args:
        name: A name of `NETWORKS`, `torchvision:NAME`, or `package.module:factory`: a callable that is given
            `num_classes` and `in_channels`, each if it takes it, and returns the network.
        classes: Width of the output.
        channels: Channels of an image.
        side: Height and width of an image in pixels.
        seed: Seed of the initial weights.

    Raises:
        ValueError: An unknown name (names the closest), or images that do not suit the network.
    """
    entry = find_network(name)
    if side < entry.least_side:
        raise ValueError(f"network {name!r} takes images of at least {entry.least_side} pixels a side, not {side}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry.build(ImageShape(classes, channels, side)).eval()


def _torchvision(name: str, shape: ImageShape) -> nn.Module:
    import torchvision.models

    model = name.removeprefix("torchvision:")
    known = torchvision.models.list_models(torchvision.models)
    if model not in known:
        hint = did_you_mean(name, [f"torchvision:{one}" for one in known])
        raise ValueError(f"network is {name!r}; {hint}torchvision {torchvision.__version__} has no such model")
    if shape.channels != 3:
        raise ValueError(f"network {name!r} takes images of 3 channels, not {shape.channels}")
    options = TORCHVISION_OPTIONS.get(model, {})
    return torchvision.models.get_model(model, weights=None, num_classes=shape.classes, **options)


def _factory(name: str, shape: ImageShape) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"network is {name!r}, which cannot be imported: {error}") from error
    if not callable(factory):
        raise ValueError(f"network is {name!r}, which is no callable that returns a network")
    try:
        network = factory(**_accepted(factory, shape))
    except TypeError as error:
        raise ValueError(f"network is {name!r}, which cannot be called: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"network is {name!r}, which returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _accepted(factory: Callable[..., object], shape: ImageShape) -> dict[str, int]:
    """The arguments of those on offer that a factory takes; open keywords are trusted with the usual one only."""
    parameters = inspect.signature(factory).parameters
    is_open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted = {"num_classes": shape.classes} if is_open or "num_classes" in parameters else {}
    return accepted | ({"in_channels": shape.channels} if "in_channels" in parameters else {})
