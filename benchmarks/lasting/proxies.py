"""Trainability without training: published scores of a network at one batch, written fresh from their papers.

Each takes a network in evaluation mode whose parameters require gradients, in float32, and leaves it as it is. All of
them were made for networks with random weights; here the network is trained and cut, and only Zen and SynFlow look
away from that (Zen draws new weights, SynFlow takes them without signs). Higher should be better for all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

Images = Float[Tensor, "image ..."]
Labels = Int64[Tensor, " image"]

ZEN_DRAWS, ZEN_MIX = 4, 0.01
"""Weights drawn for a Zen-score (the paper: 32), and the step alpha between its two inputs (as in the paper)."""
EPSILON = 1e-5
"""Added to the eigenvalues of the Jacobian's correlations, as in the paper."""
RECTIFIERS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


def gradient_norm(network: nn.Module, images: Images, labels: Labels) -> float:
    """Sum over parameters of the Euclidean norm of the loss's gradient.

    Abdelfattah et al., Zero-Cost Proxies for Lightweight NAS (ICLR 2021, arXiv 2101.08134).
    """
    return float(sum(g.norm() for g in _gradients(network, images, labels)))


def snip(network: nn.Module, images: Images, labels: Labels) -> float:
    """Sum of |w dL/dw|.

    Lee et al., SNIP (ICLR 2019, arXiv 1810.02340), the connection sensitivity before its normalisation, summed as
    in Abdelfattah et al. 2021.
    """
    pairs = zip(network.parameters(), _gradients(network, images, labels), strict=True)
    return float(sum((w.detach() * g).abs().sum() for w, g in pairs))


def grasp(network: nn.Module, images: Images, labels: Labels) -> float:
    """Sum of -w (H g): how much the weights together add to the gradient's flow.

    Wang et al., GraSP (ICLR 2020, arXiv 2002.07376), without its temperature; summed as in Abdelfattah et al. 2021.
    """
    weights = list(network.parameters())
    first = _gradients(network, images, labels, differentiable=True)
    # H g is the gradient of g . stop(g)
    second = torch.autograd.grad(sum((g * g.detach()).sum() for g in first), weights, allow_unused=True)
    return float(-sum((w.detach() * h).sum() for w, h in zip(weights, second, strict=True) if h is not None))


def synflow(network: nn.Module, images: Images, labels: Labels) -> float:
    """Logarithm of the sum over weights of w dR/dw, R the sum of what all-ones make of the weights without signs.

    Tanaka et al., SynFlow (NeurIPS 2020, arXiv 2006.05467), in float64. BatchNorm only scales here: shifts and biases
    are 0, so that R is the sum over paths of the product of their weights. Of the images, only the shape is read.
    """
    linear = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        for module in linear.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        for parameter in linear.parameters():
            parameter.abs_()
    weights = [parameter for parameter in linear.parameters() if parameter.dim() > 1]
    flow = linear(torch.ones_like(images[:1], dtype=torch.float64)).sum()
    flows = torch.autograd.grad(flow, weights)
    return math.log(float(sum((w.detach() * g).sum() for w, g in zip(weights, flows, strict=True))))


def naswot(network: nn.Module, images: Images, labels: Labels) -> float:
    """Logarithm of |det K|, K[i, j] = how many rectifiers are both on or both off for images i and j.

    Mellor et al., Neural Architecture Search without Training (ICML 2021, arXiv 2006.04647).
    """
    agreed = torch.zeros(len(images), len(images), dtype=torch.float64)

    def see(x: Tensor) -> None:
        on = (x.detach() > 0).flatten(1).float()
        agreed.add_(on @ on.T + (1 - on) @ (1 - on.T))

    with torch.no_grad(), Rectified(see):
        network(images)
    return float(torch.linalg.slogdet(agreed).logabsdet)


def jacobian_covariance(network: nn.Module, images: Images, labels: Labels) -> float:
    """-sum (log(v + k) + 1 / (v + k)) over the eigenvalues v of the correlations between the images' Jacobians.

    Mellor et al., first version of arXiv 2006.04647; a Jacobian is that of the summed outputs.
    """
    inputs = images.clone().requires_grad_(True)
    (jacobian,) = torch.autograd.grad(network(inputs).sum(), inputs)
    values = torch.linalg.eigvalsh(torch.corrcoef(jacobian.flatten(1).double())) + EPSILON
    # Rounding takes an eigenvalue of 0 below it.
    values = values.clamp_min(EPSILON)
    return float(-(values.log() + 1 / values).sum())


def zen(network: nn.Module, images: Images, labels: Labels) -> float:
    """Log of how far the last rectified maps of x and x + alpha e are apart, plus what BatchNorm took away before them.

    Lin et al., Zen-NAS (ICCV 2021, arXiv 2102.01063), algorithm 1: weights, x and e from N(0, 1), BatchNorm with the
    batch's statistics, to whose scale each of them adds log sqrt(mean variance). Averaged over seeded draws. We keep
    shortcuts, which the paper takes out. Of the images, only shape and number are read.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = copy.deepcopy(network).float().eval()
    norms = [module for module in drawn.modules() if isinstance(module, _BatchNorm)]
    scores = [_zen(drawn, norms, images.shape, generator) for _ in range(ZEN_DRAWS)]
    return float(sum(scores)) / ZEN_DRAWS


@torch.no_grad()
def _zen(network: nn.Module, norms: list[_BatchNorm], shape: torch.Size, generator: torch.Generator) -> float:
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) if parameter.dim() > 1 else torch.zeros(()))
    scales: list[float] = []
    for norm in norms:
        norm.weight.fill_(1.0)
        norm.training = True
    x = torch.randn(shape, generator=generator)
    mixed = x + ZEN_MIX * torch.randn(shape, generator=generator)
    features: list[Tensor] = []

    def scale(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
        scales.append(0.5 * math.log(float(inputs[0].var(axes, correction=0).mean())))

    for inputs in (x, mixed):
        # Only the first of the two inputs sets the scale, as in the paper.
        handles = [norm.register_forward_pre_hook(scale) for norm in norms if not features]
        seen: list[Tensor] = []
        with Rectified(lambda out, seen=seen: seen.__setitem__(slice(None), [out.clone()])):
            network(inputs)
        features += seen
        for handle in handles:
            handle.remove()
    apart = (features[0] - features[1]).flatten(1).norm(dim=1).mean()
    return math.log(float(apart)) + sum(scales)


class Rectified(TorchDispatchMode):
    """Shows what rectifiers put out, be they modules or functions.

    Args:
        see: Called with each output, before an in-place operation changes it.
    """

    def __init__(self, see: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in RECTIFIERS:
            self._see(out)
        return out


def _gradients(network: nn.Module, images: Images, labels: Labels, *, differentiable: bool = False) -> list[Tensor]:
    """Gradient of the loss in each parameter; zeros where it has none."""
    weights = list(network.parameters())
    loss = cross_entropy(network(images), labels)
    found = torch.autograd.grad(loss, weights, create_graph=differentiable, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


PROXIES = {
    "gradient_norm": gradient_norm,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
    "naswot": naswot,
    "jacobian_covariance": jacobian_covariance,
    "zen": zen,
}
"""Name -> (network, images, labels) -> score."""
