"""From a trained runtime agent to the network that is deployed: no SB3, no environment, only what an input needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from torch import nn

from agents.runtime_policy import WIDTH, BudgetPolicy
from agents.runtime_stages import RuntimeLearner
from prune_env.envs.runtime_dynamics import SPREAD, RuntimeProblem
from prune_env.pruning.engine.deployed import DeployedNetwork, deploy
from prune_env.pruning.engine.policy import PolicySeat, RuntimePolicy, Sight
from prune_env.pruning.gating.fixed import FixedDecisions
from prune_env.pruning.gating.stored import static_decisions, stored_inputs
from prune_env.pruning.gating.tradeoff import StaticDecision
from prune_env.pruning.measure import Budget


def deployed_network(learner: RuntimeLearner, *, offset: float = 0.0, budget: float | None = None) -> DeployedNetwork:
    """The network as it is deployed: static part cut, static agent dropped, runtime agent inside.

    Args:
        learner: The trained network and agents.
        offset: Added to every runtime share, to meet a budget exactly.
        budget: What the agents are told: a share or a number of macs; None is the run's own.
    """
    problem = learner.problem
    aim = learner.budget if budget is None else problem.budget_of(budget)
    statics = learner.statics(aim)
    # At trust 0 all that is stored is active: the static shares have met the budget.
    even = 1.0 if learner.runtime is None else float(np.clip(problem.even_keep(aim) + offset, problem.min_keep, 1.0))
    decide = FixedDecisions((even,) * len(problem.channels), statics, trust=problem.trust)
    policy = None
    if learner.runtime is not None:
        decisions = static_decisions(problem.gated, decide.static_keeps, decide.trust)
        policy = runtime_policy(learner.runtime, problem, decisions, aim, offset=offset)
    return deploy(problem.gated, decide, policy)


def runtime_policy(
    agent: RecurrentPPO, problem: RuntimeProblem, decisions: Sequence[StaticDecision], budget: Budget, *, offset: float
) -> RuntimePolicy:
    """The agent's mean decisions as plain tensors, for the channels that are stored.

    What the agent sees is the same for every input in all fields but four (`runtime_dynamics.IMAGE_FIELDS`); the
    others become part of its biases, and so does the pooled value of an input that is never active.

    Args:
        agent: The runtime agent.
        problem: What it was trained on.
        decisions: Static decision of each layer.
        budget: What the agent is told.
        offset: Added to every share.
    """
    network, fields = agent.policy, agent.observation_space
    assert isinstance(network, BudgetPolicy)
    assert isinstance(fields, spaces.Dict)
    sizes, extractor = {n: spaces.flatdim(s) for n, s in fields.items()}, network.features_extractor
    own, shared = _columns(extractor.own, sizes), _columns(extractor.shared, sizes, start=WIDTH)
    parameters = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    into, recurrent, *biases = (network.lstm_actor.get_parameter(name).detach() for name in parameters)
    even = problem.even_keep(budget)
    scores = [score.detach() for score in problem.gated.static.scores()]
    seats = []
    for at, (decision, inputs) in enumerate(zip(decisions, stored_inputs(problem.gated, decisions), strict=True)):
        encoder = extractor.encoders[at]
        assert isinstance(encoder, nn.Linear)
        columns = {name: encoder.weight.detach()[:, where] for name, where in own.items()}
        sees = {
            name: Sight(float(mean), 1 / float(SPREAD * spread))
            for name, (mean, spread) in (
                ("pooled", problem.scale.pooled[at]),
                ("runtime", problem.scale.runtime[at]),
                ("static", problem.scale.static[at]),
            )
        }
        kept, width = decision.kept, problem.inputs[at]
        never = torch.ones(width, dtype=torch.bool).index_fill_(0, inputs, False)
        static = sees["static"](scores[at][kept])
        nothing = sees["pooled"](torch.zeros(int(never.sum())))
        facts = {
            "position": torch.tensor([at / len(decisions)]),
            "budget": torch.tensor([budget.fraction]),
            "even": torch.tensor([even]),
            "layer": torch.from_numpy(problem.shapes[at]),
        }
        constant = sum(into[:, shared[name]] @ value.float() for name, value in facts.items())
        seats.append(
            PolicySeat(
                pooled=columns["pooled"][:, :width][:, inputs].T,
                runtime=columns["runtime_importance"][:, kept].T,
                encoder_bias=encoder.bias.detach()
                + columns["static_importance"][:, kept] @ static
                + columns["pooled"][:, :width][:, never] @ nothing,
                recurrent_bias=biases[0] + biases[1] + constant,
                sees=(sees["pooled"], sees["runtime"]),
                even=even + offset,
            )
        )
    return RuntimePolicy(
        seats,
        encoded=into[:, :WIDTH].T,
        recurrent=recurrent.T,
        spent=into[:, shared["spent"]][:, 0],
        previous=into[:, shared["previous_keep"]][:, 0],
        head=network.action_net.weight.detach()[0],
        head_bias=float(network.action_net.bias.detach()),
        least=problem.min_keep,
    )


def _columns(names: Sequence[str], sizes: dict[str, int], start: int = 0) -> dict[str, slice]:
    """Where each field lies among the columns of a weight."""
    ends = np.cumsum([sizes[name] for name in names]) + start
    return {name: slice(int(end) - sizes[name], int(end)) for name, end in zip(names, ends, strict=True)}
