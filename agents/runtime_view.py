"""The runtime environment as Stable-Baselines3 sees it: one vector env for the runtime agent, one for the static one.

Both agents act relative to the even share, as the core paper's do: share = even + action, so that a policy whose mean
starts at zero starts at the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch.nn import functional

from agents.runtime_agent import AgentDecisions
from prune_env.envs.runtime_dynamics import IMAGE_FIELDS, SAVING, budget_term
from prune_env.envs.runtime_pruning import RuntimePruningVectorEnv
from prune_env.number_format import autocast
from prune_env.pruning.gating.walk import answer

Observation = dict[str, np.ndarray]


class _View(VecEnv):
    """What both views share: actions wait for `step_wait`, and all sub-environments are one object."""

    observation_space: spaces.Dict

    def __init__(self, count: int, fields: dict[str, spaces.Space]) -> None:
        self.render_mode = None
        super().__init__(count, spaces.Dict(fields), spaces.Box(-1.0, 1.0, (1,), np.float32))
        self._actions = np.zeros((count, 1), dtype=np.float32)

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions."""
        self._actions = np.asarray(actions, dtype=np.float64)

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, once for each sub-environment."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set the attribute; there is one for all."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call the method once; its answer for each sub-environment."""
        return [getattr(self, method_name)(*args, **kwargs)] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Never."""
        return [False] * len(list(self._get_indices(indices)))

    def _first_seed(self) -> int | None:
        """The seed that `seed()` left for the next reset."""
        seed = self._seeds[0]
        self._reset_seeds()
        return seed


class RuntimeView(_View):
    """Every image is an episode of the runtime agent; the static shares are decided already.

    Rewards are the terms `accuracy` and `macs`: what is stored is not this agent's doing. With a price, `macs` is
    replaced by `-price (B - Bbar)`, and the price follows the mean of the batch: dual ascent on a budget that holds in
    the mean over images, so that easy ones may pay for hard ones. The paper's term holds each image to the budget.

    With `means`, a reward is what the actions win over the agent's own mean decisions for the same image: the
    self-critical baseline of Rennie et al., "Self-critical Sequence Training" (CVPR 2017). It does not depend on the
    actions, so the gradient's expectation is the same, but losses differ between images by far more than by what is
    decided about them, and a critic that sees pooled maps cannot tell how hard an image is. The paper has the critic
    alone.

    Args:
        env: Its problem should hold `static_keeps` unless the runtime is trusted alone.
        price: Price of the dense network's macs to begin with; None takes the paper's term.
        means: The agent's mean decisions at a budget, whose reward is the baseline; None: rewards as they are.
    """

    RATE = 2.0
    """Change of the price for a batch that misses its budget by all of the dense macs."""

    def __init__(
        self,
        env: RuntimePruningVectorEnv,
        *,
        price: float | None = None,
        means: Callable[..., AgentDecisions] | None = None,
    ) -> None:
        self.env, self.price, self.means = env, price, means
        super().__init__(env.num_envs, _fields(env))

    def reset(self) -> Observation:
        """First observations of a new batch."""
        self._seen, _ = self.env.reset(seed=self._first_seed())
        return self._seen

    def step_wait(self) -> tuple[Observation, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Take the step that was asked for."""
        keeps = np.clip(self._seen["even"] + self._actions, 0.0, 1.0)
        self._seen, _, over, _, infos = self.env.step(np.concatenate([keeps, self._seen["even"]], axis=1))
        if not over.any():
            return self._seen, np.zeros(self.num_envs, dtype=np.float32), over, [{} for _ in range(self.num_envs)]
        final = infos["final_info"]
        paid = self._paid(final, final["loss"], final["macs"])
        rewards = paid - self._paid(final, *self._by_means(final, self.means)) if self.means else paid
        if self.price is not None:
            excess = float((final["macs"] - final["budget"]).mean())
            self.price = max(0.0, self.price + self.RATE * excess)
        told = [
            {
                "terminal_observation": infos["final_obs"][at],
                "episode": {"r": float(paid[at]), "l": len(self.env.problem.channels), "t": 0.0},
                "macs": float(final["macs"][at]),
                "correct": bool(final["correct"][at]),
            }
            for at in range(self.num_envs)
        ]
        return self._seen, rewards.astype(np.float32), over, told

    def _paid(self, final: dict[str, np.ndarray], losses: np.ndarray, macs: np.ndarray) -> np.ndarray:
        """Rewards of the finished images for losses and macs, at the price that held."""
        budget = float(final["budget"][0])
        accuracy = -losses / np.maximum(final["mean_loss"], 1e-8)
        if self.price is None:
            return accuracy + budget_term(macs, budget, saving=SAVING)
        return accuracy - self.price * (macs - budget)

    def _by_means(
        self, final: dict[str, np.ndarray], means: Callable[..., AgentDecisions]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Loss and macs of each finished image under the agent's mean decisions."""
        problem = self.env.problem
        index = torch.from_numpy(final["image"]).to(problem.images.device)
        decide = means(budget=float(final["budget"][0]))
        with torch.no_grad(), autocast(problem.images.device, problem.dtype):
            logits = answer(problem.walker.walk(problem.images[index]), decide)
        assert decide.passage is not None
        losses = functional.cross_entropy(logits.float(), problem.labels[index], reduction="none")
        return losses.double().cpu().numpy(), decide.passage.macs()


class StaticView(_View):
    """Every batch of images is an episode of the static agent, which never sees them.

    Args:
        envs: One per parallel episode.
        act: The runtime agent: observations of a batch -> its actions, `[images, 1]`; a new batch is announced by
            `position` 0. None keeps the even share.

    Rewards are the terms `accuracy` (mean over the batch) and `params`.
    """

    def __init__(
        self, envs: Sequence[RuntimePruningVectorEnv], act: Callable[[int, Observation], np.ndarray] | None
    ) -> None:
        self.envs, self.act = tuple(envs), act
        super().__init__(len(self.envs), {n: s for n, s in _fields(envs[0]).items() if n not in IMAGE_FIELDS})

    def reset(self) -> Observation:
        """First observations of new batches."""
        seed = self._first_seed()
        seeds = [None if seed is None else seed + at for at in range(len(self.envs))]
        self._seen = [env.reset(seed=seeds[at])[0] for at, env in enumerate(self.envs)]
        return self._visible()

    def step_wait(self) -> tuple[Observation, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Take the step that was asked for."""
        rewards, told = np.zeros(self.num_envs, dtype=np.float32), []
        overs = np.zeros(self.num_envs, dtype=bool)
        for at, env in enumerate(self.envs):
            seen = self._seen[at]
            runtime = np.zeros((env.num_envs, 1)) if self.act is None else self.act(at, seen)
            static = np.clip(seen["even"] + self._actions[at], 0.0, 1.0)
            keeps = np.clip(seen["even"] + runtime, 0.0, 1.0)
            self._seen[at], _, over, _, infos = env.step(np.concatenate([keeps, static], axis=1))
            overs[at] = over[0]
            if not over[0]:
                told.append({})
                continue
            final = infos["final_info"]
            rewards[at] = final["reward/accuracy"].mean() + final["reward/params"][0]
            last = {name: value for name, value in infos["final_obs"][0].items() if name not in IMAGE_FIELDS}
            episode = {"r": float(rewards[at]), "l": len(env.problem.channels), "t": 0.0}
            told.append({"terminal_observation": last, "episode": episode, "params": float(final["params"][0])})
        return self._visible(), rewards, overs, told

    def _visible(self) -> Observation:
        names = self.observation_space.spaces
        return {name: np.stack([seen[name][0] for seen in self._seen]) for name in names}


def _fields(env: RuntimePruningVectorEnv) -> dict[str, spaces.Space]:
    """What is seen of one image, field by field."""
    space = env.single_observation_space
    assert isinstance(space, spaces.Dict)
    return dict(space.items())
