"""Small networks, one for each way in which layers couple channels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def _conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Chain(nn.Module):
    """Convolutions, a flatten with 16 positions per channel, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(3, 8), nn.MaxPool2d(2), _conv(8, 6))
        self.hidden = nn.Linear(6 * 16, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.hidden(torch.flatten(self.body(x), 1))))


class Residual(nn.Module):
    """A stem and two residual blocks on one stream: one group for the stream, one inside each block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.one = nn.ModuleList([_conv(8, 6), nn.Conv2d(6, 8, 3, padding=1)])
        self.two = nn.ModuleList([_conv(8, 4), nn.Conv2d(4, 8, 3, padding=1)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for first, second in (self.one, self.two):
            x = F.relu(x + second(first(x)))
        return self.head(x.mean((2, 3)))


class PaddedShortcut(nn.Module):
    """A residual block whose shortcut pads channels with zeros: only the inside prunes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 4)
        self.conv1 = _conv(4, 6, stride=2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.conv2(self.conv1(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution of 4 groups of 2 channels, then a depthwise one with two outputs per input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _conv(3, 8)
        self.grouped = _conv(8, 12, groups=4)
        self.mix = _conv(12, 5, 1)
        self.multiply = _conv(5, 10, groups=5)
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.multiply(self.mix(self.grouped(self.first(x)))).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual with squeeze-and-excitation, as in the MobileNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 6)
        self.expand, self.depthwise = _conv(6, 12, 1), _conv(12, 12, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(y)).mean((2, 3)))


class Concatenated(nn.Module):
    """Dense connections: the second convolution reads two groups, the linear layer three."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _conv(3, 6), _conv(6, 4), _conv(10, 5)
        self.norm = nn.BatchNorm2d(15)
        self.head = nn.Linear(15, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        ab = torch.cat([a, self.b(a)], 1)
        return self.head(F.relu(self.norm(torch.cat([ab, self.c(ab)], 1))).mean((2, 3)))


class Split(nn.Module):
    """The halves of one convolution's output go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.left, self.right = _conv(4, 6), _conv(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.stem(x).chunk(2, 1)
        return self.head((self.left(left) + self.right(right)).mean((2, 3)))


class Shuffled(nn.Module):
    """A channel shuffle in the middle: what it reads and writes stays, the rest prunes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _conv(3, 8), _conv(8, 6)
        self.third, self.fourth = _conv(6, 8), _conv(8, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(x)))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.fourth(x).mean((2, 3)))


class Normalised(nn.Module):
    """GroupNorm binds channels into units of two; LayerNorm holds all of its channels together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)
        self.second = nn.Conv2d(8, 6, 3)
        self.layer_norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(F.relu(self.norm(self.first(x)))).mean((2, 3))
        return self.down(F.gelu(self.up(self.layer_norm(x))))


class Transposed(nn.Module):
    """A transposed convolution, a PReLU per channel, a bare scale parameter, a sigmoid that is not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.PReLU(8))
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.sigmoid(self.up(self.down(x)) * self.scale))


class Attention(nn.Module):
    """A transformer block: attention and the residual stream stay, the MLP's hidden width prunes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class SpatialAttention(nn.Module):
    """One channel is broadcast over many: it is coupled to none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = _conv(3, 10), nn.Conv2d(10, 1, 1)
        self.second = _conv(10, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(self.second(x * torch.sigmoid(self.gate(x))).mean((2, 3)))


NETWORKS = {
    cls.__name__.lower(): cls
    for cls in (
        Chain, Residual, PaddedShortcut, Grouped, Depthwise, Concatenated, Split, Shuffled, Normalised, Transposed,
        Attention, SpatialAttention,
    )
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """The network with random weights and BatchNorm statistics, in eval mode; input 3x8x8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = NETWORKS[name]()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def example(batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random input for the small networks."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
