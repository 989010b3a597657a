"""Fusion: the same outputs with fewer operations, and the network itself wherever that cannot be promised."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_env.pruning import fusion
from prune_env.pruning.fusion import FusedConvolution, fused
from prune_env.pruning.measure import FUSING_PAYS, Meter
from prune_env.tasks.networks import make_network

from .small_networks import NETWORKS, build, example

pytestmark = pytest.mark.skipif(not fusion._available(), reason="this torch has no fused convolutions")


class Residuals(nn.Module):
    """Both operands of the first addition are convolutions; the second writes into what it adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.inner = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=2)
        self.right = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.last, self.norm = nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.inner(self.left(x)) + self.right(x))
        y = self.norm(self.last(x))
        y += x
        return self.head(F.relu6(y, inplace=True).mean((2, 3)))


class Around(nn.Module):
    """A convolution and whatever is done with its output."""

    def __init__(self, behind) -> None:
        super().__init__()
        self.convolution, self.behind = nn.Conv2d(3, 8, 3, padding=1), behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.behind(x, self.convolution(x)).mean((2, 3))


def outputs(network: nn.Module, images: torch.Tensor, dtype: torch.dtype = torch.float32):
    """Of the fused network, and of the plain one after it."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=dtype is torch.bfloat16):
        module = fused(network, images.to(dtype), dtype)
        return module, module(images.to(dtype)).float(), network(images.to(dtype)).float()


def calls(module: nn.Module) -> list[type]:
    """Kinds of modules that a fused network calls, in order."""
    return [type(module.get_submodule(node.target)) for node in module.graph.nodes if node.op == "call_module"]


def seeded(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_of_coupling_says_the_same_and_keeps_its_network(name: str):
    network = build(name)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    holdings = [dict(vars(module)) for module in network.modules()]
    module, ours, theirs = outputs(network, example(5))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert FusedConvolution in calls(module)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert holdings == [dict(vars(module)) for module in network.modules()]


def test_a_residual_network_is_nothing_but_fused_convolutions():
    network = make_network("resnet20", classes=10, channels=3, side=32).eval()
    module, ours, theirs = outputs(network, torch.randn(3, 3, 32, 32))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert calls(module).count(FusedConvolution) == 19
    assert not {nn.Conv2d, nn.BatchNorm2d, nn.ReLU} & set(calls(module))
    assert not [node for node in module.graph.nodes if node.op == "call_function" and "add" in str(node.target)]


def test_one_of_two_added_convolutions_takes_the_other_along():
    module, ours, theirs = outputs(seeded(Residuals), example(5))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert calls(module) == [FusedConvolution] * 4 + [nn.Linear]
    assert sum(node.target is F.relu6 for node in module.graph.nodes) == 1, "not behind an addition"


def test_bfloat16_is_as_near_as_the_format_lets_it():
    network = seeded(Residuals)
    _, ours, theirs = outputs(network, example(5), torch.bfloat16)
    exact = network(example(5))
    near = torch.linalg.vector_norm(theirs - exact)
    assert 0 < torch.linalg.vector_norm(ours - exact) < 4 * near < 0.1 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize(
    ("behind", "left"),
    [
        (lambda x, y: F.relu(y), 0),
        (lambda x, y: y.relu_(), 0),
        (lambda x, y: F.hardswish(y), 0),
        (lambda x, y: torch.add(y, y), 1),  # read twice
        (lambda x, y: torch.add(y, y, alpha=2), 1),
        (lambda x, y: F.relu(y) + y, 2),  # two readers
        (lambda x, y: y + x.mean(1, keepdim=True), 1),  # broadcast
        (lambda x, y: y + 1, 1),
        (lambda x, y: F.gelu(y, approximate="tanh"), 1),
        (lambda x, y: F.leaky_relu(y, 0.5), 1),
        (lambda x, y: F.relu(torch.cat([x, x, x[:, :2]], 1).add_(y)), 2),  # writes into what is added to
    ],
)
def test_what_stands_behind_a_convolution_is_fused_where_the_kernel_can(behind, left: int):
    network = Around(behind)
    network.eval()
    module, ours, theirs = outputs(network, example(5))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert FusedConvolution in calls(module)
    names = {getattr(node.target, "__name__", node.target) for node in module.graph.nodes if node.op != "call_module"}
    assert len(names & {"relu", "add", "gelu", "hardswish", "leaky_relu", "add_", "relu_"}) == left


@pytest.mark.parametrize("last", [nn.ReLU6(), nn.Hardswish(), nn.LeakyReLU(0.3), nn.GELU("tanh"), nn.Tanh()])
def test_a_module_behind_a_convolution_is_fused_where_the_kernel_can(last: nn.Module):
    module, ours, theirs = outputs(nn.Sequential(nn.Conv2d(3, 8, 3), last).eval(), 4 * example(5))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert calls(module) == [FusedConvolution] + [nn.Tanh] * isinstance(last, nn.Tanh)


def test_padding_that_is_not_zeros_and_norms_of_the_batch_stay():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(),
    ).eval()  # fmt: skip
    module, ours, theirs = outputs(network, example(5))
    torch.testing.assert_close(ours, theirs)
    assert calls(module) == [nn.Conv2d, nn.Conv2d, FusedConvolution, nn.BatchNorm2d, nn.ReLU]


class Remembering(nn.Module):
    """Leaves its last output in itself, by name or in a list."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.layer, self.attribute = nn.Conv2d(3, 4, 1), attribute
        self.seen: list[torch.Tensor] = []
        self.last = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.attribute == "seen":
            self.seen.append(y)
        else:
            self.last = y
        return y.mean((2, 3))


@pytest.mark.parametrize("attribute", ["seen", "last"])
def test_a_network_that_notes_what_passes_runs_as_it_is(attribute: str):
    network = Remembering(attribute).eval()
    module, ours, _ = outputs(network, example(5))
    assert module is network
    kept = network.seen[0] if attribute == "seen" else network.last
    assert torch.equal(kept.mean((2, 3)), ours)


def test_hooks_control_flow_and_other_forward_passes_are_left_alone():
    hooked, seen = build("residual"), []
    hooked.stem[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    branching = Around(lambda x, y: y if y.sum() > 0 else -y).eval()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    replaced = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    replaced[0].forward = lambda x: x * 2
    for network in (hooked, branching, linear, replaced):
        assert outputs(network, example(5))[0] is network
    assert seen == [5, 5], "each batch of both calls, and no example"


def test_a_fused_network_that_says_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch):
    wrong = {**fusion.MODULES, nn.ReLU: lambda module: fusion.Unary("tanh")}
    monkeypatch.setattr(fusion, "MODULES", wrong)
    network = build("residual")
    assert outputs(network, example(5))[0] is network


class Overwriting(nn.Module):
    """A rectifier changes what the convolution before it has read: the convolution cannot run later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.convolution = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.convolution(x)
        return (y + x.relu_().square()).mean((2, 3))


def test_what_overwrites_a_convolution_s_input_is_found_out():
    network = seeded(Overwriting)
    module, ours, _ = outputs(network, example(5))
    assert module is network
    torch.testing.assert_close(ours, network(example(5)))


def test_images_are_left_as_they_are():
    images = example(5)
    before = images.clone()
    with torch.inference_mode():
        fused(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)).eval(), images, torch.float32)
    assert torch.equal(images, before)


def test_the_meter_fuses_where_it_pays_and_measures_the_same(monkeypatch: pytest.MonkeyPatch):
    network, side = build("residual"), 64
    images = torch.randn(FUSING_PAYS // side**2, 3, side, side, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(images)) % 5
    few, many = Meter(images[:-1], labels[:-1]), Meter(images, labels)
    seen: list[nn.Module] = []
    monkeypatch.setattr("prune_env.pruning.measure.fused", lambda n, *rest: seen.append(fused(n, *rest)) or seen[-1])
    few.accuracy_and_loss(network)
    assert not seen
    accuracy, loss = many.accuracy_and_loss(network)
    assert FusedConvolution in calls(seen[0])
    with torch.inference_mode():
        logits = network(images)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=2 / len(images))
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
