"""The agents of runtime pruning: how they are built, stored without a pickle, and asked for their mean decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents.runtime_policy import BudgetPolicy
from prune_env.envs.runtime_dynamics import IMAGE_FIELDS, Passage, RuntimeProblem
from prune_env.pruning.gating.layer import Question
from prune_env.pruning.gating.tradeoff import count_of
from prune_env.pruning.measure import Budget

RANGE = {"runtime": 100.0, "static": 1e-3}
"""Weight of the range regulariser, from the official code."""

FITTINGS = 30
"""Steps of the bisection that moves static shares until they meet a budget."""


@dataclass(frozen=True)
class PpoSettings:
    """PPO as in the core paper's official code, but for learning rate and deviation, which its schedule of weeks fits.

    Attributes:
        lr: Adam's learning rate (paper: 1e-6).
        log_std: Logarithm of the deviation that policies start with (paper: -4).
        epochs: Passes over a rollout (paper: 1).
        minibatch: Episodes of a minibatch (paper: 64).
        self_critical: Whether the runtime agent's rewards are relative to its mean decisions (paper: not).
    """

    lr: float = 1e-3
    log_std: float = -2.3
    epochs: int = 4
    minibatch: int = 64
    self_critical: bool = True


def make_agent(kind: str, view: VecEnv, layers: int, settings: PpoSettings, seed: int) -> RecurrentPPO:
    """A fresh agent for one of the two views.

    Args:
        kind: `runtime` or `static`.
        view: Its vector env; one rollout is one episode of each.
        layers: Steps of an episode.
        settings: Of PPO.
        seed: Of its initial weights and its noise.
    """
    episodes = min(settings.minibatch, view.num_envs)
    return RecurrentPPO(
        BudgetPolicy,
        view,
        learning_rate=settings.lr,
        n_steps=layers,
        batch_size=layers * episodes,
        n_epochs=settings.epochs,
        gamma=0.999,
        gae_lambda=0.95,
        clip_range=0.2,
        clip_range_vf=0.2,
        normalize_advantage=True,
        ent_coef=RANGE[kind],
        vf_coef=0.5,
        max_grad_norm=0.5,
        policy_kwargs={"log_std_init": settings.log_std},
        seed=seed,
        device="cpu",
    )


def tensors_of(agent: RecurrentPPO) -> dict[str, Tensor]:
    """Weights and optimiser state of an agent."""
    tensors = {f"policy/{name}": value.detach().clone() for name, value in agent.policy.state_dict().items()}
    for at, values in agent.policy.optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{at}/{name}": torch.as_tensor(value).clone() for name, value in values.items()}
    return tensors


def restore(agent: RecurrentPPO, tensors: Mapping[str, Tensor]) -> None:
    """Bring an agent to the state that `tensors_of` read.

    Raises:
        ValueError: The tensors belong to another agent.
    """
    policy = {name.removeprefix("policy/"): value for name, value in tensors.items() if name.startswith("policy/")}
    try:
        agent.policy.load_state_dict(policy)
        state = agent.policy.optimizer.state_dict()
        state["state"] = {}
        for name, value in tensors.items():
            if name.startswith("adam/"):
                _, at, key = name.split("/")
                state["state"].setdefault(int(at), {})[key] = value.clone()
        agent.policy.optimizer.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"the stored agent does not fit: {str(error).splitlines()[0]}") from None


class MeanActions:
    """An agent's mean actions, with its memory of the layers before.

    Args:
        agent: Whose.
        episodes: Batches that walk side by side, each with a memory of its own.
    """

    def __init__(self, agent: RecurrentPPO) -> None:
        self.policy = agent.policy
        self._states: dict[int, Any] = {}

    def __call__(self, at: int, seen: Mapping[str, np.ndarray]) -> np.ndarray:
        """Actions `[images, 1]` of batch `at`; position 0 starts it anew."""
        starts = np.full(len(seen["position"]), float(seen["position"][0, 0]) == 0.0)
        state = None if starts[0] else self._states[at]
        self.policy.set_training_mode(False)
        # The network around it may run in bfloat16; the agent is small, and its states go through numpy.
        with torch.autocast(self.policy.device.type, enabled=False):
            actions, self._states[at] = self.policy.predict(
                dict(seen), state=state, episode_start=starts, deterministic=True
            )
        return np.asarray(actions, dtype=np.float64)


class AgentDecisions:
    """The agents' mean decisions as answers to a gated network's questions, for any batch.

    Args:
        problem: With the static shares, unless the runtime is trusted alone.
        agent: The runtime agent; None keeps the even share.
        budget: What the agent is told; None is the problem's own.
        offset: Added to every share, to meet a budget exactly.
    """

    def __init__(
        self,
        problem: RuntimeProblem,
        agent: RecurrentPPO | None,
        *,
        budget: int | float | Budget | None = None,
        offset: float = 0.0,
    ) -> None:
        self.problem, self.offset = problem, offset
        self.budget = problem.budget_of(problem.value if budget is None else budget)
        self._act = None if agent is None else MeanActions(agent)
        self.passage: Passage | None = None

    def __call__(self, question: Question) -> Tensor:
        """The active channels."""
        size = len(question.runtime)
        if question.index == 0:
            self.passage = Passage(self.problem, self.budget, size)
        assert self.passage is not None
        keep = np.full(size, self.problem.even_keep(self.budget) + self.offset)
        if self._act is not None:
            keep = keep + self._act(0, self.passage.observe(question))[:, 0]
        return self.passage.decide(question, keep, self.problem.even_keep(self.budget))


class DrawnBudgets:
    """Mean decisions at a budget that is drawn for each batch, so that a network learns to serve all of a span.

    A network that is trained at one budget gains nothing from more channels, and loses much without those that it has
    always had: no choice per image can pay then. (The official code trains it at the mean decisions of one budget.)

    Args:
        at: Budget -> the mean decisions at it.
        span: Lowest and highest budget, shares of the dense macs.
    """

    def __init__(self, at: Callable[[float], AgentDecisions], span: tuple[float, float]) -> None:
        self.at, self.span = at, span
        self._decide: AgentDecisions | None = None

    def __call__(self, question: Question) -> Tensor:
        """The active channels."""
        if question.index == 0:
            low, high = self.span
            # From torch's own generator, which the training loop seeds anew in every epoch: a resumed one is the same.
            self._decide = self.at(low + (high - low) * float(torch.rand(())))
        assert self._decide is not None
        return self._decide(question)


def static_keeps(agent: RecurrentPPO | None, problem: RuntimeProblem, budget: Budget) -> tuple[float, ...]:
    """The static agent's decisions: one call per layer, the same for all inputs; the agent can be dropped then.

    Where nothing is left to the runtime decision they alone fix the macs, and are moved by one number to meet the
    budget.

    Args:
        agent: The static agent; None keeps the even share.
        problem: What is decided.
        budget: What the agent is told.
    """
    keeps = _static_means(agent, problem, budget)
    if problem.trust == 0:
        return fitted(keeps, problem, budget)
    return tuple(np.clip(keeps, problem.min_keep, 1.0).tolist())


def fitted(keeps: Sequence[float], problem: RuntimeProblem, budget: Budget) -> tuple[float, ...]:
    """Static shares, all moved by the largest number whose macs are within the budget if they alone fix the macs.

    Args:
        keeps: A number per layer; only the moved ones are brought into [min_keep, 1].
        problem: What is decided; its predictors score what is stored, and are counted.
        budget: On macs, not below the problem's minimum.
    """
    full = problem.channels.tolist()

    def moved(offset: float) -> np.ndarray:
        return np.clip(np.asarray(keeps, dtype=np.float64) + offset, problem.min_keep, 1.0)

    def macs(offset: float) -> float:
        wanted = torch.from_numpy(moved(offset))
        counts = [int(count_of(keep, channels)) for keep, channels in zip(wanted, full, strict=True)]
        return float(problem.accounting.macs(np.array(counts), np.array(counts)))

    low, high = problem.min_keep - max(keeps) - 1.0, 2.0 - min(keeps)
    if macs(high) <= budget.limit:
        return tuple(moved(high).tolist())
    for _ in range(FITTINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(middle) <= budget.limit else (low, middle)
    return tuple(moved(low).tolist())


def _static_means(agent: RecurrentPPO | None, problem: RuntimeProblem, budget: Budget) -> tuple[float, ...]:
    """The static agent's means, which may leave [min_keep, 1]."""
    even = problem.even_keep(budget)
    if agent is None:
        return (even,) * len(problem.channels)
    act, passage = MeanActions(agent), Passage(problem, budget, 1)
    scores, keeps = problem.gated.static.scores(), []
    for at, (name, static) in enumerate(zip(problem.gated.names, scores, strict=True)):
        nothing = torch.zeros(1, problem.inputs[at]), torch.zeros(1, len(static))
        question = Question(name, at, *nothing, static.detach())
        seen = {n: value for n, value in passage.observe(question).items() if n not in IMAGE_FIELDS}
        keeps.append(float(even + act(0, seen)[0, 0]))
        passage.decide(question, np.array([1.0]), keeps[-1])
    return tuple(keeps)
