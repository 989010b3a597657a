"""Walking: the same as a forward pass, with a stop at each gate, and nothing kept that is no longer needed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_env.pruning.gating.layer import Question
from prune_env.pruning.gating.network import attach
from prune_env.pruning.gating.walk import Walker, answer, everything
from prune_env.pruning.tracing import trace
from tests.env.gated_networks import GATEABLE, by_masks, random_masks, trained
from tests.env.small_networks import example
from tests.env.test_networks import build as build_zoo


class Branching(nn.Module):
    """What it does depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu().mean((2, 3))
        return self.head(x) if x.sum() > 0 else self.head(-x)


class Dropping(nn.Sequential):
    """Asks its own mode in plain code, as torchvision's inception and densenet do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](F.dropout(self[1](self[0](x)).relu(), 0.5, training=self.training).mean((2, 3)))


def recorded(masks: dict[str, torch.Tensor], questions: list[Question]):
    decide = by_masks(masks)

    def ask(question: Question) -> torch.Tensor:
        questions.append(question)
        return decide(question)

    return ask


@pytest.mark.parametrize("static", ["vector", "filters"])
@pytest.mark.parametrize("name", GATEABLE)
def test_walking_asks_and_answers_as_a_forward_pass(name: str, static: str) -> None:
    gated, x = trained(name, seed=1, static=static), example(3)
    masks, forward, walked = random_masks(gated, 3), [], []
    with torch.no_grad():
        gated.decide = recorded(masks, forward)
        expected = gated(x)
        found = answer(Walker(gated).walk(x), recorded(masks, walked))
        gated.decide = None
        assert not torch.equal(expected, gated(x))  # the masks count
    assert torch.equal(found, expected)
    assert [(q.index, q.name) for q in walked] == [(q.index, q.name) for q in forward] == [*enumerate(gated.names)]
    for one, other in zip(forward, walked, strict=True):
        for attribute in ("pooled", "runtime", "static"):
            assert torch.equal(getattr(one, attribute), getattr(other, attribute))
            assert not getattr(other, attribute).requires_grad


@pytest.mark.parametrize("name", ["cnn", "lenet300100", "m-cifarnet", "resnet20"])
def test_zoo_networks_can_be_walked(name: str) -> None:
    network, x = build_zoo(name)
    gated = attach(network, trace(network, x[:1]), x[:1])
    masks = random_masks(gated, len(x))
    gated.decide = by_masks(masks)
    with torch.no_grad():
        assert torch.equal(answer(Walker(gated).walk(x), by_masks(masks)), gated(x))


def test_a_question_comes_before_what_hangs_on_its_answer() -> None:
    gated, ran = trained("chain"), []
    for name in ("body.2.0", "hidden", "head"):
        gated.network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    gated.network.body[2][0].producer.register_forward_hook(lambda *_: ran.append("convolution"))
    walk = Walker(gated).walk(example(2))
    first = next(walk)
    second = walk.send(everything(first))
    assert (first.name, second.name, ran) == ("body.0.0", "body.2.0", [])
    assert walk.send(everything(second)).name == "hidden"
    assert ran == ["convolution"]


def test_the_walker_follows_weights_and_modes_and_can_walk_twice_at_once() -> None:
    gated, x = trained("chain"), example(4)
    walker = Walker(gated)
    before = answer(walker.walk(x), everything)

    def walking_meanwhile(question: Question) -> torch.Tensor:
        answer(walker.walk(-x), everything)
        return everything(question)

    assert torch.equal(answer(walker.walk(x), walking_meanwhile), before)
    with torch.no_grad():
        gated.layers[0].shift += 1.0
    after = answer(walker.walk(x), everything)
    assert torch.equal(after, gated(x))
    assert not torch.equal(after, before)
    after.sum().backward()
    assert gated.layers[0].gate.weight.grad.any()
    gated.train()
    answer(walker.walk(x), everything)
    assert gated.layers[0].norm.num_batches_tracked == 1


def test_feature_maps_are_freed_once_nobody_reads_them() -> None:
    gated = trained("shuffled")
    maps: list[weakref.ref] = []
    for module in gated.network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, __, output: maps.append(weakref.ref(output)))
    alive = []
    gc.disable()
    try:
        with torch.no_grad():
            walk = Walker(gated).walk(example(2))
            question = next(walk)
            while True:
                alive.append(sum(ref() is not None for ref in maps))
                question = walk.send(everything(question))
    except StopIteration:
        alive.append(sum(ref() is not None for ref in maps))
    finally:
        gc.enable()
    assert len(maps) == 4
    assert max(alive) == 1  # what the waiting layer reads
    assert alive[-1] == 0


def test_a_finished_layer_s_input_is_not_held_until_the_next_gate() -> None:
    gated, x = trained("chain"), example(2)
    seen: list[weakref.ref] = []
    counts: list[int] = []
    gated.network.body[1].register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    gated.network.body[2][2].register_forward_hook(lambda *_: counts.append(sum(r() is not None for r in seen)))
    with torch.no_grad():
        answer(Walker(gated).walk(x), everything)
    assert counts == [0]


def test_code_that_asks_its_mode_is_walked_as_in_evaluation() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Dropping(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)).eval()
    gated = attach(network, trace(network, example()), example()).train()
    walker = Walker(gated)
    assert gated.network.training
    with torch.no_grad():
        gated.eval()
        assert torch.equal(answer(walker.walk(example(2)), everything), gated(example(2)))


def test_a_network_that_looks_at_its_values_cannot_be_walked() -> None:
    network = Branching().eval()
    gated = attach(network, trace(network, example()), example())
    with pytest.raises(ValueError, match=r"^the network cannot be walked layer by layer: .+\Z"):
        Walker(gated)
