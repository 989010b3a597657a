"""The stored part of a gated network: it computes and learns what the whole one would, and gives it back."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from prune_env.gates import deciding
from prune_env.pruning.gating.fixed import FixedDecisions
from prune_env.pruning.gating.layer import Decide
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.gating.stored import StoredPart, _origins, static_decisions
from tests.env.gated_networks import GATEABLE, trained
from tests.env.small_networks import example

KEEP, LABELS = 0.6, torch.arange(7) % 5


def split(name: str, trust: float, static: str = "vector") -> tuple[GatedNetwork, StoredPart, FixedDecisions]:
    """A network, its stored part, and the decisions that remove the rest."""
    gated = trained(name, static=static)
    keeps = (KEEP,) * len(gated.names)
    decide = FixedDecisions(keeps, keeps, trust=trust)
    return gated, StoredPart.of(gated, static_decisions(gated, keeps, trust)), decide


def gradients(network: GatedNetwork, decide: Decide) -> dict[str, torch.Tensor]:
    network.zero_grad()
    with deciding(network.train(), decide):
        cross_entropy(network(example(7)), LABELS).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trust", [0.0, 0.5])
@pytest.mark.parametrize("name", GATEABLE)
def test_it_computes_and_learns_what_the_whole_network_would(name: str, trust: float) -> None:
    gated, part, decide = split(name, trust)
    assert any(decision.removed.any() for decision in part.decisions)
    with deciding(gated, decide), deciding(part.small, part.answering(decide)):
        torch.testing.assert_close(part.small(example(7)), gated(example(7)), rtol=1e-4, atol=1e-4)
    origins = _origins(gated, part.decisions)
    whole, small = gradients(gated, decide), gradients(part.small, part.answering(decide))
    assert small.keys() <= whole.keys()
    for key, gradient in small.items():
        torch.testing.assert_close(gradient.flatten(), whole[key].flatten()[origins[key]], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", GATEABLE)
def test_what_it_has_learned_is_put_back_and_the_rest_stays(name: str) -> None:
    gated, part, decide = split(name, 0.5)
    before = {key: value.clone() for key, value in gated.state_dict().items()}
    with torch.no_grad():
        for parameter in part.small.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    part.put_back()
    with deciding(gated, decide), deciding(part.small, part.answering(decide)):
        torch.testing.assert_close(gated(example(7)), part.small(example(7)), rtol=1e-4, atol=1e-4)
    origins = _origins(gated, part.decisions)
    for key, value in gated.state_dict().items():
        if key in origins and not key.startswith("static"):
            others = torch.ones(value.numel(), dtype=torch.bool).index_fill_(0, origins[key], False)
            assert torch.equal(value.flatten()[others], before[key].flatten()[others]), key


def test_nothing_learned_changes_nothing() -> None:
    gated, part, _ = split("chain", 0.5)
    before = {key: value.clone() for key, value in gated.state_dict().items()}
    part.put_back()
    for key, value in gated.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-5)


def test_removed_channels_rank_below_whatever_was_learned_and_as_before_among_themselves() -> None:
    gated, part, _ = split("chain", 0.0)
    order = [score[decision.removed].argsort() for score, decision in _scored(gated, part)]
    with torch.no_grad():
        for vector in part.small.static.vectors:
            vector.sub_(100.0)
    part.put_back()
    for (score, decision), before in zip(_scored(gated, part), order, strict=True):
        assert decision.removed.any()
        assert score[decision.removed].max() < score[~decision.removed].min()
        assert torch.equal(score[decision.removed].argsort(), before)


def _scored(gated: GatedNetwork, part: StoredPart) -> list:
    return list(zip([score.detach() for score in gated.static.scores()], part.decisions, strict=True))


def test_scores_that_follow_from_the_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="free numbers"):
        split("chain", 0.5, "filters")


def test_a_removed_channel_stays_removed_when_the_stored_ones_fall_below_it() -> None:
    _, part, decide = split("chain", 0.0)
    with torch.no_grad():
        for vector in part.small.static.vectors:
            vector.sub_(100.0)
    asked = []
    with deciding(part.small, part.answering(lambda question: asked.append(question) or decide(question))):
        part.small(example(2))
    for question, decision in zip(asked, part.decisions, strict=True):
        assert torch.equal(decide(question)[0], ~decision.removed)
        assert question.runtime.shape[1] == len(decision.removed)
