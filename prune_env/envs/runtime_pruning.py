"""`prune_env/RuntimePruning-v0`: a batch of images walks through a gated network, each with decisions of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor
from torch.nn import functional

from prune_env.envs.runtime_dynamics import LossMean, Passage, RuntimeProblem, rewards, widths
from prune_env.number_format import autocast
from prune_env.pruning.gating.layer import Question
from prune_env.pruning.gating.walk import Walk

Observation = dict[str, np.ndarray]


class RuntimePruningVectorEnv(VectorEnv[Observation, np.ndarray, np.ndarray]):
    """Decide for every image, layer by layer, how many channels are computed; and for all images, how many are stored.

    ## Description

    The environment of Chen, Chen, Pan, "Storage Efficient and Dynamic Flexible Runtime Channel Pruning via Deep
    Reinforcement Learning" (NeurIPS 2020). An episode is an image, a step is a gated layer, in forward order. All
    images of the batch take their step together and go through the network in ONE forward pass. Channels of highest
    runtime importance are active, after the trade-off with the static decision
    (`prune_env.pruning.gating.tradeoff`); what the static decision removes can never be active.

    ## Action Space

    | Num | Action | Min | Max |
    |-----|--------|-----|-----|
    | 0 | share of the layer's channels that may be active for this image | 0 | 1 |
    | 1 | share of the layer's channels that the static decision keeps | 0 | 1 |

    Both are moved into [`min_keep`, 1]. A static decision may not depend on the image: the mean of the batch's second
    numbers is taken, which for a policy that does not look at the image is each of them.

    ## Observation Space

    A flat `Dict` of float32 `Box`es.

    | Field | Length | Meaning |
    |-------|--------|---------|
    | `position` | 1 | layers decided, as a share |
    | `budget` | 1 | the batch's budget, share of the dense macs |
    | `even` | 1 | the share which, kept in every layer, costs the budget |
    | `index` | layers + 1 | one-hot of the layer; the last entry is the end |
    | `layer` | 6 | shape of the layer, see `runtime_dynamics.SHAPE` |
    | `static_importance` | widest layer | static score of each channel, standardised over the layer, / 5, in [-1, 1] |
    | `spent` | 1 | macs so far of this image, share of the dense network's / 2 |
    | `previous_keep` | 1 | runtime share in the previous layer |
    | `pooled` | widest input | the layer's pooled input, standardised, / 5, in [-1, 1] |
    | `runtime_importance` | widest layer | runtime score of each channel for this image, standardised likewise |

    The last four depend on the image; `runtime_dynamics.IMAGE_FIELDS` names them. Both importances are 0 beyond the
    layer's width and, where the problem's `static_keeps` are given, for channels that they remove for good: once
    deployed these are cut away. As inputs such channels are zero for every image, so `pooled` shows a constant.

    ## Rewards

    0 until the last layer, then the sum of three terms, on what was really kept (after trade-off and rounding):

    | Term | Value |
    |------|-------|
    | `accuracy` | -loss of the image / running mean of losses |
    | `macs` | -1.2 (exp((B - Bbar) / .03) - 1) above the budget, .1 (Bbar - B) below; B: macs of the image |
    | `params` | the same for the stored parameters, nothing below the budget |

    Bbar of `params` is the share that the even keep leaves. The exponent is bounded at 5.

    ## Starting State

    `reset` draws the next `num_envs` images without replacement; `options={"budget": x}` sets the batch's budget, else
    it is drawn from `budget_range`, or is `budget`. A seed also resets the running mean of losses.

    ## Episode End

    All episodes terminate together at the last layer. Autoreset is `SAME_STEP`: the observation is the first of the
    next batch, `infos["final_obs"]` and `infos["final_info"]` belong to the finished one.

    ## Info

    | Key | When | Meaning |
    |-----|------|---------|
    | `group` | always | the layer just decided; after `reset`, the one to decide first |
    | `active`, `kept` | step | channels active for the image, channels stored |
    | `macs`, `params` | step | shares of the dense network's so far |
    | `static_keep` | step | the static share that was applied |
    | `image` | last step | the image's place in the problem's images |
    | `loss`, `correct` | last step | of the image |
    | `mean_loss` | last step | running mean of losses that the reward is relative to |
    | `budget` | last step | the batch's budget |
    | `reward/<term>` | last step | the terms of the reward |

    Nothing is measured by a clock.

    ## Version History

    * v0: initial version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, problem: RuntimeProblem, *, num_envs: int = 128, render_mode: str | None = None) -> None:
        """Take a problem; `gymnasium.make_vec` builds one from names.

        Args:
            problem: What is decided; several envs may share one.
            num_envs: Images that walk together.
            render_mode: None: there is nothing to draw.

        Raises:
            ValueError: `num_envs` is below 1 or above the number of images, or a render mode is asked for.
        """
        if isinstance(num_envs, bool) or not isinstance(num_envs, int) or not 1 <= num_envs <= len(problem.images):
            raise ValueError(f"num_envs is {num_envs!r}; 1 to {len(problem.images)} (the images there are) is allowed")
        if render_mode is not None:
            raise ValueError(f"render_mode is {render_mode!r}; only None is allowed")
        self.problem, self.num_envs, self.render_mode = problem, num_envs, render_mode
        fields: dict[str, spaces.Space[Any]] = {
            name: spaces.Box(low, 1.0, (width,), np.float32) for name, (low, width) in widths(problem).items()
        }
        self.single_observation_space = spaces.Dict(fields)
        self.single_action_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._mean = LossMean()
        self._order = np.empty(0, dtype=np.int64)
        self._walk: Walk | None = None
        self._question: Question | None = None

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start a batch of episodes.

        Args:
            seed: Seeds images and budgets, and forgets the mean of losses.
            options: `budget`: the batch's budget, a share in (0, 1] or a number of macs.

        Raises:
            ValueError: An unknown option, or a budget that cannot be reached.
        """
        options = dict(options or {})
        unknown = sorted(set(options) - {"budget"})
        if unknown:
            raise ValueError(f"reset options {unknown} are unknown; allowed: ['budget']")
        if seed is not None:
            self._np_random = np.random.default_rng(seed)
            self._np_random_seed = seed if isinstance(seed, int) else None
            self._mean, self._order = LossMean(), np.empty(0, dtype=np.int64)
        first, info = self._start(options.get("budget"))
        return first, self._infos(info)

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Decide the current layer for every image.

        Args:
            actions: `[num_envs, 2]` runtime and static share.

        Raises:
            ResetNeeded: There was no `reset` yet.
            ValueError: Actions of another shape, or not finite.
            FloatingPointError: The network's loss on an image is NaN or Inf; the next call must be `reset`.
        """
        seen, terms, info = self._play(actions)
        no, nothing = np.zeros(self.num_envs, dtype=bool), np.zeros(self.num_envs)
        if terms is None:
            return seen, nothing, no, no.copy(), self._infos(info)
        finals = np.empty(self.num_envs, dtype=object)
        for at in range(self.num_envs):
            finals[at] = {name: rows[at] for name, rows in seen.items()}
        first, opening = self._start(None)
        infos = self._infos(opening)
        infos |= {"final_obs": finals, "_final_obs": ~no, "final_info": self._infos(info), "_final_info": ~no}
        return first, sum(terms.values(), nothing), ~no, no, infos

    def _play(self, actions: Any) -> tuple[Observation, dict[str, np.ndarray] | None, dict[str, Any]]:
        """Decide the current layer: what is seen behind it, at the end the terms of the reward, and the info."""
        if self._walk is None or self._question is None:
            raise ResetNeeded("call reset() before step()")
        shares = np.asarray(actions, dtype=np.float64)
        if shares.shape != (self.num_envs, 2):
            raise ValueError(f"actions have the shape {shares.shape}; {self.num_envs} x 2 shares in [0, 1] are allowed")
        if not np.isfinite(shares).all():
            raise ValueError(f"actions hold {shares[~np.isfinite(shares)][0]}; finite shares in [0, 1] are allowed")
        question, passage = self._question, self._passage
        active = passage.decide(question, shares[:, 0], float(shares[:, 1].mean()))
        logits = self._advance(active)
        info = {
            "group": question.name,
            "active": passage.active[-1],
            "kept": passage.kept[-1],
            "macs": passage.macs(),
            "params": passage.params(),
            "static_keep": passage.statics[-1],
        }
        seen = passage.observe(self._question)
        return seen, None if logits is None else self._finish(logits, info), info

    def _start(self, budget: Any) -> tuple[Observation, dict[str, Any]]:
        """Draw images and a budget, and go to the first layer: what is seen there, and the info."""
        problem = self.problem
        if budget is None:
            budget = problem.value if problem.span is None else float(self.np_random.uniform(*problem.span))
        self._passage = Passage(problem, problem.budget_of(budget), self.num_envs)
        if len(self._order) < self.num_envs:
            self._order = self.np_random.permutation(len(problem.images))
        drawn, self._order = self._order[: self.num_envs], self._order[self.num_envs :]
        index = torch.from_numpy(drawn).to(problem.images.device)
        self._drawn = drawn
        self._labels = problem.labels[index]
        self._walk = problem.walker.walk(problem.images[index])
        self._advance(None)
        question = self._question
        assert question is not None, "a walk begins with a question"
        return self._passage.observe(question), {"group": question.name}

    def _advance(self, active: Tensor | None) -> Tensor | None:
        """Go on to the next question; the outputs, if there is none."""
        assert self._walk is not None
        self._question = None
        with torch.no_grad(), autocast(self.problem.images.device, self.problem.dtype):
            try:
                self._question = next(self._walk) if active is None else self._walk.send(active)
            except StopIteration as end:
                return end.value
        return None

    def _finish(self, logits: Tensor, info: dict[str, Any]) -> dict[str, np.ndarray]:
        """Terms of the reward; what the images came to goes into `info`."""
        losses = functional.cross_entropy(logits.float(), self._labels, reduction="none").double().cpu().numpy()
        if not np.isfinite(losses).all():
            bad = losses[~np.isfinite(losses)]
            raise FloatingPointError(
                f"the loss of {len(bad)} of {len(losses)} images is {bad[0]}; the gated network's weights or scores "
                "have diverged"
            )
        self._mean = self._mean.updated(losses)
        terms = rewards(losses, self._mean, self._passage)
        info |= {"image": self._drawn, "loss": losses, "correct": (logits.argmax(1) == self._labels).cpu().numpy()}
        info |= {"mean_loss": self._mean.value, "budget": self._passage.budget.fraction}
        info |= {f"reward/{name}": value for name, value in terms.items()}
        return terms

    def _infos(self, values: dict[str, Any]) -> dict[str, Any]:
        """Infos in Gymnasium's vector form: an array per key, and a mask of who has it."""
        infos: dict[str, Any] = {}
        for name, value in values.items():
            dtype = object if isinstance(value, str) else None
            # A copy, so that what a user does to it reaches neither the passage nor another key.
            infos[name] = np.full(self.num_envs, value, dtype=dtype) if np.ndim(value) == 0 else np.array(value)
            infos[f"_{name}"] = np.ones(self.num_envs, dtype=bool)
        return infos


class RuntimePruningEnv(gymnasium.Env[Observation, np.ndarray]):
    """One image at a time: `RuntimePruningVectorEnv` for a single image, see there. For tests and for looking."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, problem: RuntimeProblem, *, render_mode: str | None = None) -> None:
        self.vector = RuntimePruningVectorEnv(problem, num_envs=1, render_mode=render_mode)
        self.problem, self.render_mode = problem, render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start with the next image."""
        super().reset(seed=seed)
        seen, infos = self.vector.reset(seed=seed, options=options)
        self._over = False
        return {name: rows[0] for name, rows in seen.items()}, {"group": infos["group"][0]}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decide the current layer.

        Raises:
            ResetNeeded: The episode is over or has not begun.
        """
        if self._over:
            raise ResetNeeded("the episode is over or has not begun; call reset()")
        # Without autoreset: that would draw an image which the next reset throws away.
        seen, terms, info = self.vector._play(np.asarray(action, dtype=np.float64)[None])
        self._over = terms is not None
        reward = 0.0 if terms is None else float(sum(value[0] for value in terms.values()))
        return {name: rows[0] for name, rows in seen.items()}, reward, self._over, False, _single(info)


def _single(info: dict[str, Any]) -> dict[str, Any]:
    """The info of the only image, in plain Python values."""
    return {name: value[0].item() if isinstance(value, np.ndarray) else value for name, value in info.items()}
