"""Short training: one cycle of a few steps, on the same images for every network; and splits made of a split."""

from __future__ import annotations

import pytest
import torch

from prune_env.tasks.networks import make_network
from prune_env.tasks.training import Hook, train_steps
from prune_env.tasks.training.settings import one_cycle
from tests.env.trainings import same, settings, state_of, training_split


@pytest.fixture
def split():
    return training_split()


def test_short_training_is_one_cycle_of_that_many_steps(split):
    seen = []
    hook = Hook(after_step=lambda state: seen.append((state.step, state.steps, state.lr)))
    train_steps(make_network("cnn", classes=10, channels=1, side=8), split, steps=5, settings=settings(), hooks=[hook])
    cycle = [one_cycle(settings(), step=step, steps=5) for step in range(5)]
    assert seen == [(step, 5, lr) for step, lr in enumerate(cycle)]


def test_short_training_repeats_itself_and_shows_every_network_the_same(split):
    networks = [make_network("cnn", classes=10, channels=1, side=8, seed=seed) for seed in (0, 0, 1)]
    shown = [[], [], []]
    for network, images in zip(networks, shown, strict=True):
        hook = Hook(before_step=lambda state, images=images: images.append(state.images.clone()))
        train_steps(network, split, steps=3, settings=settings(), hooks=[hook])
    assert same(state_of(networks[0]), state_of(networks[1]))
    assert all(torch.equal(one, other) for one, other in zip(shown[0], shown[2], strict=True))
    assert not networks[0].training


def test_short_training_begins_again_where_the_images_run_out(split):
    few = split.at(torch.arange(10))
    labels = []
    hook = Hook(before_step=lambda state: labels.append(state.labels))
    network = make_network("cnn", classes=10, channels=1, side=8)
    train_steps(network, few, steps=3, settings=settings(batch_size=64, crop=0), hooks=[hook])
    assert [len(batch) for batch in labels] == [10, 10, 10]
    assert torch.cat(labels).bincount().tolist() == (3 * few.labels.bincount()).tolist()


def test_short_training_refuses_what_it_cannot_do(split):
    network = make_network("cnn", classes=10, channels=1, side=8)
    with pytest.raises(ValueError, match="steps is 0, with"):
        train_steps(network, split, steps=0, settings=settings())
    with pytest.raises(ValueError, match="with 0 training images"):
        train_steps(network, split.at(torch.arange(0)), steps=1, settings=settings())


def test_images_of_a_split_make_a_split(split):
    positions = torch.tensor([7, 3, 7])
    part = split.at(positions)
    assert len(part) == 3
    assert torch.equal(part.labels, split.labels[positions])
    assert torch.equal(part.pixels(torch.arange(3)), split.pixels(positions))
