"""The stages of the core paper's training, one after another, each from the state that the one before it stored."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback

from agents.runtime_agent import (
    AgentDecisions,
    DrawnBudgets,
    MeanActions,
    make_agent,
    restore,
    static_keeps,
    tensors_of,
)
from agents.runtime_options import RuntimeTrainConfig
from agents.runtime_view import RuntimeView, StaticView
from prune_env.envs.runtime_dynamics import RuntimeProblem, Scale
from prune_env.envs.runtime_pruning import RuntimePruningVectorEnv
from prune_env.files import write
from prune_env.gates import attached, gate_settings, train_gated
from prune_env.pruning.gating.layer import Decide
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.gating.stored import StoredPart, static_decisions
from prune_env.pruning.measure import Budget
from prune_env.runtime_config import SCALE_IMAGES, problem_of
from prune_env.tasks.task import Task

VERSION = 1
PRICE = 1.0
"""Price of the dense network's macs that the runtime agent starts with, in mean losses."""

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Stage:
    """One unit of work between two checkpoints.

    Attributes:
        kind: `gates`, `scores`, `network` or `agents`.
        amount: Epochs, or rollouts of each agent.
        round: Round of the alternation, 0 before it.
    """

    kind: str
    amount: int
    round: int = 0


def stages_of(config: RuntimeTrainConfig) -> list[Stage]:
    """All stages of a run in order.

    The network learns before the agents in each round (the official code: after them), because at first it has never
    seen a missing channel, and rewards would tell agents nothing.
    """
    plan = config.stages
    listed = [Stage("gates", plan.gates), Stage("scores", plan.scores)]
    for number in range(1, plan.rounds + 1):
        listed += [Stage("network", plan.network, number), Stage("agents", plan.rollouts, number)]
    listed.append(Stage("network", plan.final, plan.rounds + 1))
    return [stage for stage in listed if stage.amount]


def release_of(config: RuntimeTrainConfig) -> int:
    """Number of the first stage in which static scores learn."""
    return next(at for at, stage in enumerate(stages_of(config)) if stage.kind != "gates")


class RuntimeLearner:
    """A gated network and its two agents, in training.

    Args:
        task: What is pruned.
        config: Of the run.
        folder: Where checkpoints are written.
    """

    def __init__(self, task: Task, config: RuntimeTrainConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.gated: GatedNetwork = attached(task, static=config.static_importance)
        self.problem: RuntimeProblem = problem_of(task, self.gated, config.env())
        self.budget: Budget = self.problem.budget_of(config.budget if config.keep is None else self._macs(config.keep))
        self.problem = dataclasses.replace(
            self.problem, value=self.budget.fraction, span=self._span(config.budget_spread)
        )
        layers, settings, trust = len(self.problem.channels), config.stages.ppo, config.runtime_trust
        views = self._views(self.problem, None)
        self.runtime = make_agent("runtime", views[0], layers, settings, config.seed) if trust > 0 else None
        self.static = make_agent("static", views[1], layers, settings, config.seed + 1) if trust < 1 else None
        self.price: float | None = PRICE if config.budget_per == "mean" else None
        self.done = 0
        self.history: list[dict[str, Any]] = []

    @property
    def budget_scale(self) -> float:
        """Macs of the dense network."""
        return self.problem.accounting.dense_macs

    def _span(self, spread: float) -> tuple[float, float]:
        """The budgets around the run's own that can be reached."""
        fraction, least = self.budget.fraction, self.problem.minimum / self.budget_scale + 1e-6
        low, high = (float(np.clip(fraction * factor, least, 1.0)) for factor in (1 - spread, 1 + spread))
        return low, high

    def _macs(self, keep: float) -> float:
        """What a share in every layer costs.

        Raises:
            ValueError: Less than can be reached.
        """
        problem = self.problem
        macs, least = problem.accounting.even_macs(keep), problem.budget_of(math.ceil(problem.minimum))
        if macs < least.limit:
            # Rounded up, so that the share in the message is one that works.
            smallest = math.ceil(problem.even_keep(least) * 1e4) / 1e4
            raise ValueError(
                f"keep is {keep}; predictors are counted, and a layer keeps at least {problem.min_keep:g}, so "
                f"{smallest:g} is the smallest keep allowed"
            )
        return macs

    def _views(self, problem: RuntimeProblem, statics: tuple[float, ...] | None) -> tuple[RuntimeView, StaticView]:
        """The vector envs of the two agents."""
        size, parts = self.config.images_at_once, self.config.static_batches
        fixed = dataclasses.replace(problem, static_keeps=statics)
        agent = getattr(self, "runtime", None)
        act = None if agent is None else MeanActions(agent)
        means = None
        if agent is not None and self.config.stages.ppo.self_critical:
            means = partial(AgentDecisions, fixed, agent)
        split = [RuntimePruningVectorEnv(problem, num_envs=size // parts) for _ in range(parts)]
        price = getattr(self, "price", None)
        view = RuntimeView(RuntimePruningVectorEnv(fixed, num_envs=size), price=price, means=means)
        return view, StaticView(split, act)

    def statics(self, budget: Budget | None = None) -> tuple[float, ...] | None:
        """The static shares as the static agent stands, within the budget where they alone decide.

        None where the runtime is trusted alone.
        """
        if self.config.runtime_trust == 1:
            return None
        return static_keeps(self.static, self.problem, budget or self.budget)

    def decisions(self, *, offset: float = 0.0, budget: float | None = None) -> AgentDecisions:
        """Both agents' mean decisions at a budget."""
        aim = self.budget if budget is None else self.problem.budget_of(budget)
        fixed = dataclasses.replace(self.problem, static_keeps=self.statics(aim))
        return AgentDecisions(fixed, self.runtime, budget=aim, offset=offset)

    def _while_training(self) -> Decide:
        """The decisions that the network is trained under."""
        if self.config.network_spread == 0:
            return self.decisions()
        span = self._span(self.config.network_spread)
        return DrawnBudgets(lambda budget: self.decisions(budget=budget), span)

    def run(self, tell: Tell, log: Callable[[int, dict[str, float]], None]) -> None:
        """Work through the stages that are left; a checkpoint after each.

        Args:
            tell: Told (done, total, what) of the stage under way.
            log: Told (stage number, figures) after each stage.
        """
        stages = stages_of(self.config)
        self.restore()
        self._sweep()
        for at in range(self.done, len(stages)):
            stage = stages[at]
            figures = self._agents(stage, at, tell) if stage.kind == "agents" else self._network(stage, at, tell)
            self._rescale()
            self.done = at + 1
            self.history.append({"stage": at, "kind": stage.kind, "round": stage.round, **figures})
            self.save()
            self._sweep()
            log(at, figures)

    def _inside(self, at: int) -> Path:
        """The checkpoint inside a stage. A name of its own, so that no stage finds what a kill left of another."""
        return self.folder / f"stage-{at}.safetensors"

    def _sweep(self) -> None:
        """Remove the checkpoints inside stages that are done."""
        for file in self.folder.glob("stage*.safetensors"):
            if file != self._inside(self.done):
                file.unlink()

    def _network(self, stage: Stage, at: int, tell: Tell) -> dict[str, float]:
        """Train the network with frozen agents."""
        if at == release_of(self.config) and self.config.runtime_trust < 1:
            self.gated.share_scales()
        seed = self.config.seed * 1000 + at
        settings = gate_settings(self.task, epochs=stage.amount, lr=self.config.lr, seed=seed)
        if self.config.threads is not None:
            settings = dataclasses.replace(settings, threads=self.config.threads)
        part = decide = None
        if stage.kind == "network":
            part, decide = self._stored_part(), self._while_training()
            if part is not None:
                decide = part.answering(decide)
        report = train_gated(
            self.gated if part is None else part.small,
            self.task,
            settings,
            static=stage.kind != "gates",
            decide=decide,
            progress=lambda done, total, what: tell(done, total, f"{stage.kind} {stage.round or ''}: {what}"),
            checkpoint=self._inside(at),
            device=self.config.device,
        )
        if part is not None:
            part.put_back()
        self.gated.to(memory_format=torch.channels_last)
        return {"loss": report.losses[-1], "accuracy": report.accuracies[-1]}

    def _stored_part(self) -> StoredPart | None:
        """What static decisions leave of the network, to be trained alone; None where they leave all or may change."""
        statics = self.statics()
        if statics is None or self.config.network_spread or not self.gated.static.free:
            return None
        return StoredPart.of(self.gated, static_decisions(self.gated, statics, self.config.runtime_trust))

    def _agents(self, stage: Stage, at: int, tell: Tell) -> dict[str, float]:
        """Train the agents with a frozen network: the runtime agent, then the static one."""
        runtime_view, static_view = self._views(self.problem, self.statics())
        figures: dict[str, float] = {}
        for kind, agent, view in (("runtime", self.runtime, runtime_view), ("static", self.static, static_view)):
            if agent is None:
                continue
            # Every stage starts from a seed of its own, so that a resumed run goes where an uninterrupted one goes.
            seed = self.config.seed * 1000 + at
            agent.set_env(view, force_reset=True)
            agent.set_random_seed(seed)
            watch = _Watch(lambda done, kind=kind: tell(done, stage.amount, f"{kind} agent, round {stage.round}"))
            steps = len(self.problem.channels) * view.num_envs
            agent.learn(steps * stage.amount, callback=watch, log_interval=10**9)
            if kind == "runtime" and runtime_view.price is not None:
                self.price = figures["price"] = float(runtime_view.price)
            figures |= {f"{kind}_reward_first": watch.rewards[0], f"{kind}_reward": float(np.mean(watch.rewards[-10:]))}
        return figures

    def _rescale(self) -> None:
        """Bring the observations' scale in line with the network."""
        problem = self.problem
        scale = Scale.of(problem.walker, problem.images[:SCALE_IMAGES], problem.dtype)
        self.problem = dataclasses.replace(problem, scale=scale)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors = {f"gated/{name}": value for name, value in self.gated.state_dict().items()}
        for kind, agent in self._by_kind():
            tensors |= {f"{kind}/{name}": value for name, value in tensors_of(agent).items()}
        for name in ("pooled", "runtime", "static"):
            tensors[f"scale/{name}"] = torch.from_numpy(getattr(self.problem.scale, name))
        header = json.dumps({"version": VERSION, "done": self.done, "price": self.price, "history": self.history})
        whole = {name: value.contiguous() for name, value in tensors.items()}
        write(self.folder / "checkpoint.safetensors", to_bytes(whole, {"state": header}))

    def restore(self) -> None:
        """Go to the checkpoint, if there is one.

        Raises:
            ValueError: It is corrupt.
        """
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return
        try:
            with safe_open(str(path), framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            if state["version"] != VERSION:
                raise ValueError("it is of another version")
            parts = {kind: _below(tensors, f"{kind}/") for kind in ("gated", "runtime", "static", "scale")}
            self.gated.load_state_dict(parts["gated"])
            for kind, agent in self._by_kind():
                restore(agent, parts[kind])
            scale = Scale(**{name: value.numpy() for name, value in parts["scale"].items()})
            self.problem = dataclasses.replace(self.problem, scale=scale)
            self.price = state["price"]
            self.done, self.history = int(state["done"]), list(state["history"])
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is corrupt: {str(error).splitlines()[0]}") from None

    def _by_kind(self) -> Iterator[tuple[str, RecurrentPPO]]:
        for kind, agent in (("runtime", self.runtime), ("static", self.static)):
            if agent is not None:
                yield kind, agent


class _Watch(BaseCallback):
    """Counts rollouts and keeps their mean rewards."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.tell, self.rewards, self._paid = tell, [], []

    def _on_step(self) -> bool:
        self._paid += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.rewards.append(float(np.mean(self._paid)) if self._paid else 0.0)
        self._paid = []
        self.tell(len(self.rewards))


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
