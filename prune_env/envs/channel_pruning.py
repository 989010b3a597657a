"""`prune_env/ChannelPruning-v0`: the decision process of `dynamics` as a Gymnasium environment."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from prune_env.envs import dynamics, observation, render
from prune_env.envs.dynamics import Problem, State
from prune_env.pruning.measure import Measurement

Observation = dict[str, np.ndarray]


class ChannelPruningEnv(gymnasium.Env[Observation, np.ndarray]):
    """Decide, layer by layer, how many channels of a trained network are kept.

    ## Description

    An episode is a network, a step is a group of channels that live or die together, in forward order. The agent says
    which share of the group's channels is kept; the channels of highest static importance are. After the last group
    the network is really cut, repaired (refit from second moments, BatchNorm recalibrated) and measured on the search
    split. The test split is out of reach.

    ## Action Space

    | Num | Action | Min | Max |
    |-----|--------|-----|-----|
    | 0 | share of the group's channels that is kept | 0 | 1 |

    The count is the nearest one that is allowed (`round_to`, `min_channels`, `min_keep`) and affordable: with all later
    groups at their minimum, the budget must hold. So every episode ends inside its budget and no group is ever empty.

    ## Observation Space

    A flat `Dict` of float32 `Box`es in [0, 1]. Resources are shares of the dense network's value.

    | Field | Length | Meaning |
    |-------|--------|---------|
    | `position` | 1 | steps decided, as a share of all steps |
    | `budget` | 1 | the episode's budget |
    | `spent` | 1 | used by decided groups and fixed layers among themselves |
    | `forced` | 1 | what the open groups add at their minimum |
    | `left` | 1 | budget - spent - forced |
    | `rest` | 1 | what the open groups add when kept whole |
    | `price` | 1 | what this group adds when kept whole instead of at its minimum |
    | `feasible` | 2 | smallest and largest share that may be kept now |
    | `previous_keep` | 1 | share kept in the previous step, 1 at the start |
    | `layer` | 11 | shape and place of the group's first layer, see `observation.LAYER` |
    | `static_importance` | 11 | quantiles over the channels, relative to the group's largest |
    | `static_level` | 1 | mean of the group, relative to the largest mean of all groups |
    | `runtime_importance` | 11 | quantiles over the channels of the mean pooled activation |
    | `runtime_spread` | 11 | quantiles over the channels of its deviation from image to image |
    | `error_curve` | 9 | relative reconstruction error of the next layers at evenly rising keep |

    ## Rewards

    0 until the last step, then the sum of the terms of `reward` (see `prune_env.presets.PRESETS`). It names what the
    network earns, and how it is measured before that:

    | Name | Measured | Terms |
    |------|----------|-------|
    | `accuracy`, `instant` | at once | `accuracy` |
    | `accuracy_guaranteed` | at once | `error_log_size` = -error * log(macs) |
    | `exponential_penalty` | at once | `accuracy` = -error, `budget` = -1.2 (exp((B - Bbar) / 0.03) - 1) above it |
    | `short-training` | after `short_steps` steps of training in place | `accuracy` |
    | `predicted` | at once; from that and the widths, a file foretells the rest | `accuracy`, as foretold |

    The penalty comes due with `hard_budget=False` only; `accuracy_guaranteed` is meant for `budget=1`. A plan is
    measured once: its reward is a pure function of the actions, however it is measured.

    ## Starting State

    Nothing is decided. `reset(options={"budget": x})` sets the episode's budget, a share in (0, 1] or an absolute
    number; else it is drawn uniformly from `budget_range`, or is `budget`.

    ## Episode End

    The episode terminates when all groups are decided. It is never truncated.

    ## Info

    | Key | When | Meaning |
    |-----|------|---------|
    | `group` | always | the group just decided; after `reset`, the one to decide first |
    | `macs`, `params` | always | size of the plan so far, open groups whole |
    | `budget` | always | the episode's budget as a share |
    | `requested`, `applied` | step | the action, and the share that is kept |
    | `channels` | step | channels kept |
    | `clamped` | step | whether the budget moved the action |
    | `accuracy`, `loss` | last step | the pruned network on the search split, as the reward measures it |
    | `steps` | last step | optimiser steps that this measurement takes |
    | `budget_met` | last step | whether the plan is inside the budget |
    | `counts` | last step | channels kept in each group of the graph |
    | `plan` | last step | the plan as JSON, for `prune_env.Plan.from_json` |
    | `reward/<term>` | last step | the terms of the reward |

    Nothing is measured by a clock.

    ## Arguments

    By `gymnasium.make` (or `prune_env.make_env`): `task="digits-cnn"` and every field of `prune_env.EnvConfig` and
    `prune_env.TaskConfig`. All are numbers, text and lists, so the spec is JSON:

    ```python
    env = gymnasium.make("prune_env:prune_env/ChannelPruning-v0", task="digits-cnn", budget=0.5)
    ```

    For a network and data of your own (or with `make_problem`, for a `Task`), build the problem first:

    ```python
    problem = prune_env.problem_from(network, calibration=(images, labels), search=(images, labels), budget=0.5)
    env = prune_env.ChannelPruningEnv(problem)
    ```

    ## Version History

    * v0: initial version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(self, problem: Problem, *, render_mode: str | None = None) -> None:
        """Take a problem; `gymnasium.make` and `prune_env.make_env` build one from names.

        Args:
            problem: What is decided. It is constant: several envs may share one.
            render_mode: `ansi`, `rgb_array` or None.

        Raises:
            ValueError: An unknown render mode.
        """
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode {render_mode!r} is unknown; allowed: {self.metadata['render_modes']}, None")
        self.problem = problem
        self.render_mode = render_mode
        self.action_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.observation_space = observation.space()
        self._state: State | None = None
        self._pruned: Measurement | None = None

    @property
    def state(self) -> State:
        """Where the episode is; frozen, so it can be kept.

        Raises:
            ResetNeeded: There was no `reset` yet.
        """
        if self._state is None:
            raise ResetNeeded("call reset() before asking for the state")
        return self._state

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seeds the budgets that are drawn.
            options: `budget`: this episode's budget, a share in (0, 1] or an absolute number.

        Raises:
            ValueError: An unknown option, or a budget that cannot be reached.
        """
        super().reset(seed=seed)
        state = dynamics.start(self.problem, self._budget(options or {}))
        self._pruned = None
        return self._enter(state), {"group": self._group(state), **self._sizes(state)}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decide the next group.

        Args:
            action: The share of its channels that is kept, `[1]`.

        Raises:
            ResetNeeded: The episode is over or has not begun.
            ValueError: The action is not one finite number.
        """
        if self._state is None or dynamics.finished(self.problem, self._state):
            raise ResetNeeded("the episode is over or has not begun; call reset()")
        before = self._state
        keep = _share(action)
        state = dynamics.apply(self.problem, before, keep)
        info = {"group": self._group(before), "requested": keep} | self._applied(before, state, keep)
        info |= self._sizes(state)
        seen = self._enter(state)
        if not dynamics.finished(self.problem, state):
            return seen, 0.0, False, False, info
        terms = self._measure(state, info)
        return seen, float(sum(terms.values())), True, False, info

    def render(self) -> str | np.ndarray | None:
        """The plan so far, as text (`ansi`) or as a picture `[height, width, 3]` uint8 (`rgb_array`)."""
        if self.render_mode is None:
            gymnasium.logger.warn("render() was called, but no render_mode was given to make()")
            return None
        return render.RENDERERS[self.render_mode](self.problem, self.state, self._pruned)

    def _budget(self, options: dict[str, Any]) -> Any:
        """The episode's budget: asked for, drawn, or the problem's own."""
        unknown = sorted(set(options) - {"budget"})
        if unknown:
            raise ValueError(f"reset options {unknown} are unknown; allowed: ['budget']")
        if "budget" in options:
            return options["budget"]
        if self.problem.span is not None:
            return float(self.np_random.uniform(*self.problem.span))
        return None

    def _enter(self, state: State) -> Observation:
        """Go to a state and look at it."""
        self._state = state
        return observation.observe(self.problem, state, dynamics.outlook(self.problem, state))

    def _group(self, state: State) -> str:
        """Name of the group that a state decides next."""
        return self.problem.graph.groups[self.problem.steps[state.position]].name

    def _applied(self, before: State, after: State, keep: float) -> dict[str, Any]:
        """What became of an action."""
        at, count = before.position, after.kept[-1]
        whole = self.problem.channels[at]
        free = dynamics.nearest(self.problem.allowed[at], keep * whole)
        return {"applied": count / whole, "channels": count, "clamped": free != count}

    def _sizes(self, state: State) -> dict[str, Any]:
        """Size of the plan so far."""
        counts = dynamics.counts(self.problem, state)
        sizes = {name: int(cost(counts)) for name, cost in self.problem.graph.cost.items()}
        return {**sizes, "budget": float(state.budget.fraction)}

    def _measure(self, state: State, info: dict[str, Any]) -> dict[str, float]:
        """Measure the finished plan, write what it is worth into `info` and return the terms of the reward."""
        plan = dynamics.plan(self.problem, state)
        self._pruned = self.problem.evaluator.measure(plan)
        terms = dict(self.problem.reward(self.problem.dense, self._pruned, state.budget))
        info |= {
            "accuracy": self._pruned.accuracy,
            "loss": self._pruned.loss,
            "steps": self._pruned.steps,
            "budget_met": info[state.budget.resource] <= state.budget.limit,
            "counts": tuple(dynamics.counts(self.problem, state).tolist()),
            "plan": plan.to_json(),
        }
        info |= {f"reward/{name}": float(value) for name, value in terms.items()}
        return terms


def _share(action: Any) -> float:
    """An action as a finite number."""
    numbers = np.asarray(action, dtype=np.float64).reshape(-1)
    if numbers.size != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"action is {action!r}; one finite number in [0, 1] is allowed")
    return float(numbers[0])
