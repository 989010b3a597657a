"""Networks without long residual stacks: the digits CNN, LeNet-300-100, M-CifarNet and VGG for small images."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from prune_env.tasks.initialisation import initialise
from prune_env.tasks.resnet import ResidualBlock


class ConvNormReLU(nn.Sequential):
    """3x3 convolution without bias, BatchNorm, rectifier."""

    def __init__(self, channels_in: int, channels: int, *, stride: int = 1, padding: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class DigitsCnn(nn.Module):
    """A small network for 8x8 digits whose layers differ in cost and in use, so that layer ratios matter.

    The wide layers work at full resolution and cost most; the narrow ones behind them carry everything.
    """

    def __init__(self, *, classes: int, channels: int) -> None:
        super().__init__()
        self.stem = ConvNormReLU(channels, 16)
        self.wide = ConvNormReLU(16, 32)
        self.down = ConvNormReLU(32, 16, stride=2)
        self.block = ResidualBlock(16, 16, 1)
        self.narrow = ConvNormReLU(16, 12)
        self.head = ConvNormReLU(12, 32, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(32, classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Images to logits."""
        x = self.block(self.down(self.wide(self.stem(x))))
        return self.linear(self.pool(self.head(self.narrow(x))).flatten(1))


class LeNet300100(nn.Module):
    """LeNet-300-100 (LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998): three linear layers.

    Args:
        inputs: Values of one image.
        classes: Width of the output.
    """

    def __init__(self, inputs: int, *, classes: int) -> None:
        super().__init__()
        self.ip1 = nn.Linear(inputs, 300)
        self.relu1 = nn.ReLU(inplace=True)
        self.ip2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU(inplace=True)
        self.ip3 = nn.Linear(100, classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n classes"]:
        """Images (or flat rows) to logits."""
        return self.ip3(self.relu2(self.ip2(self.relu1(self.ip1(x.flatten(1))))))


class MCifarNet(nn.Module):
    """M-CifarNet, the network of Gao et al., Dynamic Channel Pruning (2019), and of Chen et al. (2020) after it.

    Eight convolutions of 64 to 192 channels, the first without padding; `features` counts the two dropouts, too.
    """

    def __init__(self, *, classes: int, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormReLU(channels, 64, padding=0),
            ConvNormReLU(64, 64),
            ConvNormReLU(64, 128, stride=2),
            ConvNormReLU(128, 128),
            nn.Dropout(0.1),
            ConvNormReLU(128, 128),
            ConvNormReLU(128, 192, stride=2),
            ConvNormReLU(192, 192),
            nn.Dropout(0.1),
            ConvNormReLU(192, 192),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(192, classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Images to logits."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
"""Widths of VGG-16 (Simonyan and Zisserman 2014, configuration D); M halves the resolution."""


class VggBn(nn.Module):
    """VGG-16 with BatchNorm for 32x32 images: one linear layer instead of three, as is usual on CIFAR."""

    def __init__(self, *, classes: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in VGG16:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Images to logits."""
        return self.classifier(self.pool(self.features(x)).flatten(1))
