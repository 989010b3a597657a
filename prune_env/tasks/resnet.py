"""Residual networks for small images: He et al.'s CIFAR ResNets and Zagoruyko and Komodakis's wide ones."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prune_env.tasks.initialisation import initialise


class ZeroPadShortcut(nn.Module):
    """Every second pixel, and as many zero channels on each side as make up the new width.

    Option A of He et al., Deep Residual Learning for Image Recognition (2015), section 4.2: no parameters.
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """Half the resolution, `2 * padding` more channels."""
        # Slices say the same, but their gradient loses channels_last: a step of training takes a tenth longer.
        every_second = F.avg_pool2d(x, kernel_size=1, stride=2)
        return F.pad(every_second, (0, 0, 0, 0, self.padding, self.padding))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else ZeroPadShortcut((channels - channels_in) // 2)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """Convolve, add the shortcut, rectify."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """CIFAR ResNet of 6n+2 layers (He et al. 2015, section 4.2): n blocks each of 16, 32 and 64 channels.

    Args:
        blocks: n, the residual blocks of one stage.
        classes: Width of the output.
        channels: Channels of an image.
    """

    def __init__(self, blocks: int, *, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Images to logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


class WideBlock(nn.Module):
    """Norm and rectifier before each of two 3x3 convolutions; a 1x1 convolution as shortcut where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = channels_in == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """Rectify, convolve twice, add the shortcut; a changed shape takes the shortcut after the rectifier."""
        active = self.relu1(self.bn1(x))
        inner = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return inner + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko and Komodakis, Wide Residual Networks, 2016, arXiv 1605.07146).

    Args:
        depth: Layers, 6n+4.
        width: Factor on 16, 32 and 64 channels.
        classes: Width of the output.
        channels: Channels of an image.
    """

    def __init__(self, depth: int, width: int, *, classes: int, channels: int) -> None:
        super().__init__()
        blocks, wide = (depth - 4) // 6, 16 * width
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = _wide_stage(16, wide, blocks, stride=1)
        self.block2 = _wide_stage(wide, 2 * wide, blocks, stride=2)
        self.block3 = _wide_stage(2 * wide, 4 * wide, blocks, stride=2)
        self.bn = nn.BatchNorm2d(4 * wide)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * wide, classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Images to logits."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.pool(self.relu(self.bn(x))).flatten(1))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    later = [ResidualBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(ResidualBlock(channels_in, channels, stride), *later)


def _wide_stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    later = [WideBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(WideBlock(channels_in, channels, stride), *later)
