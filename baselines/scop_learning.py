"""How SCOP learns its scales: settings, images, control images, and the training itself, through the one loop.

    min over beta of the cross-entropy of the real images, all else frozen; beta <- clamp(beta, 0, 1) after each step

The learning rate is constant, as in the authors' code; the loop's cycle is overruled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from baselines.preparation import root_of
from baselines.scop_knockoffs import RATE, KnockoffGenerator, KnockoffTraining
from baselines.scop_knockoffs import adam as adam_on_all
from baselines.scop_layers import Control, ControlledNetwork, permuted, writers_of
from prune_env.checks import check_name
from prune_env.envs.dynamics import Problem
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import evaluating
from prune_env.tasks.dense import usual_training
from prune_env.tasks.images import ArrayImages, Split
from prune_env.tasks.normalisation import Normalisation
from prune_env.tasks.prepared import train_once
from prune_env.tasks.task import Task
from prune_env.tasks.training import Hook, TrainingState, TrainSettings, train
from prune_env.tasks.training.loop import Progress

STEPS = 1000
"""Steps of the scaled default: eight times as many as beta needs from 1/2 to an end of its range."""
MOST_EPOCHS = 30
"""Where an epoch has few steps, the scaled default stops here."""
NETWORK = "cnn"
"""Of a usual training only the learning rate depends on the network, and that is not used."""


@dataclass(frozen=True)
class Settings:
    """How the scales are learned.

    The published numbers are those of ImageNet, 20 epochs of 2,500 steps. The default is scaled down by one rule: the
    learning rate stays, the batch is that of the task's usual training, and the epochs are the fewest that make `STEPS`
    steps, but not more than `MOST_EPOCHS`.

    Attributes:
        rate: Learning rate of Adam, constant.
        decays: Decay of its two moments.
        start: Value of every beta at first.
        epochs: Passes over the training images; None goes by the rule.
        batch_size: Real images of a step, and as many control images; None takes the usual training's.
        control: What the control images are, a name in `CONTROLS`.
        pass_size: Images of a batch in the pass that repairs the norms; None takes the usual training's.

    Raises:
        ValueError: A number outside its range, or an unknown control (names the closest).
    """

    rate: float = 0.004
    decays: tuple[float, float] = (0.5, 0.9)
    start: float = 0.5
    epochs: int | None = None
    batch_size: int | None = None
    control: str = "permutation"
    pass_size: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "rate": (0 < self.rate < 1, "a number between 0 and 1"),
            "decays": (len(self.decays) == 2 and all(0 <= d < 1 for d in self.decays), "two numbers from 0 below 1"),
            "start": (0 <= self.start <= 1, "a number in [0, 1]"),
            "epochs": (self.epochs is None or self.epochs >= 1, "1 or more"),
            "batch_size": (self.batch_size is None or self.batch_size >= 2, "2 or more"),
            "pass_size": (self.pass_size is None or self.pass_size >= 2, "2 or more"),
        }
        for name, (fits, what) in allowed.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {what}")
        check_name("control", self.control, CONTROLS)

    def training(self, *, data: str, images: int, seed: int) -> TrainSettings:
        """The loop's settings.

        Args:
            data: Name of the data set; images of any other are not augmented.
            images: Size of the training split.
            seed: Seed of order, augmentation and control.
        """
        usual = usual_training(data, NETWORK, seed=seed)
        batch = self.batch_size or usual.batch_size
        epochs = self.epochs or min(MOST_EPOCHS, -(-STEPS // max(1, images // batch)))
        # Neither decay nor smoothing: beta alone learns, and the paper decays weights in fine-tuning only.
        changes = {"lr": self.rate, "weight_decay": 0.0, "label_smoothing": 0.0}
        return dataclasses.replace(usual, epochs=epochs, batch_size=batch, **changes)


@dataclass(frozen=True, eq=False)
class Source:
    """The images that something is learned from, and where what was learned is kept.

    Attributes:
        split: The images.
        data: Name of their data set.
        seed: Seed of the training.
        task: In whose cache the result is kept; None keeps none.
        progress: Told about every step.
    """

    split: Split
    data: str
    seed: int
    task: Task | None = None
    progress: Progress | None = None

    def learn(
        self,
        network: nn.Module,
        *,
        kind: str,
        settings: TrainSettings,
        hooks: Sequence[Hook],
        optimizer: Callable[[nn.Module, TrainSettings], torch.optim.Optimizer],
        content: Mapping[str, object],
    ) -> None:
        """Train in place by the one loop; a killed training is taken up again, a finished one is read.

        Args:
            network: What is trained; in evaluation mode afterwards.
            kind: The cache's folder.
            settings: Of the loop.
            hooks: Of the loop.
            optimizer: Of the loop.
            content: What else decides the outcome. JSON can hold it.

        Raises:
            TrainingDiverged: The loss, or what is trained, became NaN or Inf.
        """

        def run(checkpoint: Path | None = None) -> object:
            options = {"settings": settings, "hooks": hooks, "optimizer": optimizer, "progress": self.progress}
            return train(network, self.split, **options, checkpoint=checkpoint)

        if self.task is None:
            run()
        else:
            content = {**content, "training": dataclasses.asdict(settings)}
            train_once(network, self.task, kind=kind, content=content, run=run, root=root_of(self.task))
        network.eval()


def permutation(source: Source) -> Control:
    """The batch in random order."""
    return permuted


def generator(source: Source) -> Control:
    """A generator of knockoff images, trained on the same images first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        fresh = KnockoffTraining(KnockoffGenerator(source.split.shape[0]), source.split.classes)
    plain = Settings().training(data=source.data, images=len(source.split), seed=source.seed)
    settings = dataclasses.replace(plain, lr=RATE, dtype="float32")
    source.learn(fresh, kind="knockoffs", settings=settings, hooks=fresh.hooks(), optimizer=adam_on_all, content={})
    return fresh.generator


CONTROLS: dict[str, Callable[[Source], Control]] = {"permutation": permutation, "generator": generator}
"""What control images are: name -> images to learn from -> real images to control images."""


def learned(network: nn.Module, graph: LayerGraph, source: Source, settings: Settings) -> ControlledNetwork:
    """The network with learned selection layers, in evaluation mode; only they differ from where they began.

    Args:
        network: Dense; it is left as it is.
        graph: Its graph.
        source: Images, seed and cache.
        settings: How beta is learned.

    Raises:
        ValueError: The network runs other layers for control images than for real ones.
        TrainingDiverged: The loss or a scale became NaN or Inf.
    """
    control = CONTROLS[settings.control](source)
    controlled = ControlledNetwork(network, writers_of(graph), control=control, start=settings.start)
    source.learn(
        controlled,
        kind="scop",
        settings=settings.training(data=source.data, images=len(source.split), seed=source.seed),
        hooks=(learning(controlled, settings),),
        optimizer=lambda _, training: adam_on_scales(controlled, training, decays=settings.decays),
        content={"settings": dataclasses.asdict(settings)},
    )
    return controlled


def adam_on_scales(
    controlled: ControlledNetwork, settings: TrainSettings, *, decays: tuple[float, float]
) -> torch.optim.Optimizer:
    """Adam on the scales and nothing else, without weight decay."""
    return torch.optim.Adam(controlled.selections.parameters(), lr=settings.lr, betas=decays)


def learning(controlled: ControlledNetwork, settings: Settings) -> Hook:
    """A constant learning rate in place of the loop's cycle, and scales that stay in [0, 1]."""

    def constant(state: TrainingState) -> None:
        for group in state.optimizer.param_groups:
            group["lr"] = settings.rate

    def project(state: TrainingState) -> None:
        for selection in controlled.layers:
            selection.project()

    return Hook(before_step=constant, after_step=project)


@torch.no_grad()
def observed(problem: Problem) -> Split:
    """The calibration images as a split; their labels are what the dense network says.

    Pixels are stored as bytes from the least value of a channel to its largest: those of an image come back exactly
    wherever black and white are among them.

    Raises:
        ValueError: The inputs are no images.
    """
    images = problem.evaluator.calibration
    if images.dim() != 4:
        raise ValueError(f"SCOP without a task learns from images, not from inputs of shape {tuple(images.shape[1:])}")
    with evaluating(problem.evaluator.network) as network:
        logits = torch.cat([network(batch) for batch in images.split(250)]).cpu()
    images = images.cpu()
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    span = (high - low).clamp_min(1e-6)
    pixels = ((images - low.view(1, -1, 1, 1)) / span.view(1, -1, 1, 1) * 255).round().to(torch.uint8)
    normalise = Normalisation(tuple((-low / span).tolist()), tuple((1 / span).tolist()))
    return Split(ArrayImages(pixels), torch.arange(len(images)), logits.argmax(1), logits.shape[1], normalise)
