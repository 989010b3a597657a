"""Configurations: data that survives JSON, refuses early, and is built by `make` into a problem."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from prune_env.config import EnvConfig, TaskConfig


def test_a_config_survives_json():
    config = EnvConfig.of(
        "cifar10-resnet20",
        weights="FILE.safetensors",
        seed=3,
        budget=0.35,
        budget_range=[0.3, 0.7],
        leave=["conv1", "fc"],
        importance="taylor",
        refit="none",
        round_to=8,
    )
    assert EnvConfig.from_json(config.to_json()) == config
    assert hash(EnvConfig.from_json(config.to_json())) == hash(config)


def test_the_default_config_survives_json():
    assert EnvConfig.from_json(EnvConfig().to_json()) == EnvConfig()


def test_fields_of_the_task_and_of_the_env_come_in_one_flat_set():
    config = EnvConfig.of("digits-cnn", seed=5, budget=0.4)
    assert config.task == TaskConfig("digits-cnn", seed=5)
    assert config.budget == 0.4


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EnvConfig().budget = 0.3


def test_every_field_is_documented():
    for cls in (EnvConfig, TaskConfig):
        lines = inspect.getsource(cls).splitlines()
        for field in dataclasses.fields(cls):
            at = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}:"))
            assert lines[at + 1].strip().startswith('"""'), field.name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"importance": "tailor"}, "did you mean 'taylor'"),
        ({"reward": "acuracy"}, "did you mean 'accuracy'"),
        ({"refit": "moment"}, "did you mean 'moments'"),
        ({"budget_resource": "flops"}, "macs, params"),
        ({"budget_resource": "latency_s"}, "macs, params"),
        ({"runtime_importance": "pooled_activations"}, "did you mean 'pooled_activation'"),
        ({"bugdet": 0.5}, "did you mean 'budget'"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": -1}, "budget is -1"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget_range": (0.7, 0.3)}, "rising"),
        ({"budget_range": (0.0, 0.3)}, "rising"),
        ({"budget_range": (0.5, 2)}, "rising"),
        ({"min_channels": 0}, "min_channels is 0"),
        ({"min_keep": 1.1}, "min_keep is 1.1"),
        ({"round_to": -8}, "round_to is -8"),
        ({"calibration_images": 1}, "calibration_images is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": -1}, "epochs is -1"),
        ({"search_size": 0}, "search_size is 0"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_in_one_line(options, said):
    with pytest.raises(ValueError, match=said) as caught:
        EnvConfig.of("digits-cnn", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"budget": 0.5}', '{"task": {}, "bugdet": 1}'])
def test_a_config_file_that_is_none_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - what the JSON reader says is its own
        EnvConfig.from_json(text)
