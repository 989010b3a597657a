"""Training: augmentation, learning rate, hooks, divergence, and a resume that changes nothing."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prune_env.number_format import CPU_QUESTIONS
from prune_env.tasks.networks import make_network
from prune_env.tasks.training import Hook, TrainingDiverged, TrainSettings, train
from prune_env.tasks.training.augmentation import augment
from prune_env.tasks.training.hooks import TrainingState, adam, distillation
from prune_env.tasks.training.memory import keep_freed_memory
from prune_env.tasks.training.settings import one_cycle
from tests.env.trainings import same, settings, state_of, training_split

COMMAND = [sys.executable, "-m", "prune_env.tasks.training", "--task", "digits-cnn"]


class Dropping(nn.Module):
    """A network whose training draws random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.inner = make_network("cnn", classes=10, channels=1, side=8)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return self.inner(self.dropout(x))


@pytest.fixture
def split():
    return training_split()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_augmentation_without_crop_and_flip_is_the_identity():
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(augment(pixels, crop=0, flip=False, generator=generator()), pixels)


def test_every_augmented_image_is_a_shifted_or_mirrored_original():
    pixels = torch.randint(1, 256, (64, 2, 5, 6), dtype=torch.uint8)
    padded = nn.functional.pad(pixels, (2, 2, 2, 2))
    seen = set()
    for image, source in zip(augment(pixels, crop=2, flip=True, generator=generator()), padded, strict=True):
        matches = [
            (down, right, mirrored)
            for down in range(5)
            for right in range(5)
            for mirrored in (False, True)
            if torch.equal(image.flip(2) if mirrored else image, source[:, down : down + 5, right : right + 6])
        ]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) > 25


def test_augmentation_mirrors_about_half_of_the_images():
    pixels = torch.arange(6, dtype=torch.uint8).expand(1000, 1, 6, 6).clone()
    out = augment(pixels, crop=0, flip=True, generator=generator())
    assert 400 < int((out[:, 0, 0, 0] == 5).sum()) < 600


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    rates = [one_cycle(TrainSettings(lr=0.5), step=step, steps=100) for step in range(100)]
    assert max(rates) == 0.5
    assert rates.index(0.5) == 30
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert 0 < rates[0] < 0.02


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("batch_size", 1),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("label_smoothing", 1.0),
        ("warmup", 1.0),
        ("crop", -1),
        ("dtype", "float16"),
        ("threads", -1),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        TrainSettings(**{name: value})


def test_training_learns_and_leaves_the_global_state_alone(split):
    network = make_network("cnn", classes=10, channels=1, side=8)
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    report = train(network, split, settings=settings(epochs=5))
    assert report.losses[-1] < report.losses[0]
    assert report.accuracies[-1] > 0.6
    assert not network.training
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_the_same_seed_gives_the_same_network_and_another_seed_another(split):
    results = []
    for seed in (0, 0, 1):
        network = Dropping()
        train(network, split, settings=dataclasses.replace(settings(epochs=1), seed=seed))
        results.append(state_of(network))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize(
    ("dtype", "stop"),
    [
        *(("float32", 1), ("float32", 11), ("bfloat16", 7)),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (("float32", 7), ("bfloat16", 1), ("bfloat16", 11))),
    ],
)
def test_a_training_stopped_at_any_step_resumes_to_the_same_network(split, tmp_path, dtype, stop):
    whole = Dropping()
    report = train(whole, split, settings=settings(dtype=dtype))

    def interrupt(done, total, note):
        if done == stop:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(Dropping(), split, settings=settings(dtype=dtype), progress=interrupt, checkpoint=checkpoint)
    resumed = Dropping()
    assert train(resumed, split, settings=settings(dtype=dtype), checkpoint=checkpoint) == report
    assert same(state_of(whole), state_of(resumed))


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_a_training_runs_in_the_number_format_that_is_fast_here(split, monkeypatch, fast):
    for question in CPU_QUESTIONS:
        monkeypatch.setattr(torch.cpu, question, lambda: fast is torch.bfloat16)
    seen = []
    hook = Hook(after_step=lambda state: seen.append(state.logits.dtype))
    train(Dropping(), split, settings=settings(epochs=1, dtype="auto"), hooks=[hook])
    assert set(seen) == {fast}


def test_a_finished_checkpoint_gives_its_network_back_without_training(split, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    first, second = Dropping(), Dropping()
    report = train(first, split, settings=settings(epochs=1), checkpoint=checkpoint)
    calls = []
    again = train(second, split, settings=settings(epochs=1), checkpoint=checkpoint, progress=calls.append)
    assert again == report
    assert calls == []
    assert same(state_of(first), state_of(second))


def test_a_checkpoint_of_something_else_is_refused(split, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    train(Dropping(), split, settings=settings(epochs=1), checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"with epochs 1, not 2"):
        train(Dropping(), split, settings=settings(epochs=2), checkpoint=checkpoint)
    other = make_network("lenet300100", classes=10, channels=1, side=8)
    with pytest.raises(ValueError, match="another network"):
        train(other, split, settings=settings(epochs=1), checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated, corrupt"):
        train(Dropping(), split, settings=settings(epochs=1), checkpoint=checkpoint)


def test_a_diverging_training_stops_and_keeps_the_last_good_epoch(split):
    def poison(state):
        if state.epoch == 1:
            next(state.network.parameters()).data.fill_(float("nan"))

    good, network = Dropping(), Dropping()
    kept = {}
    watch = Hook(after_epoch=lambda state: kept.update(state_of(state.network)) if state.epoch == 0 else None)
    train(good, split, settings=settings())
    with pytest.raises(TrainingDiverged, match=r"loss is nan in epoch 2.*try a smaller lr"):
        train(network, split, settings=settings(), hooks=[watch, Hook(before_step=poison)])
    assert same(state_of(network), kept)


def test_weights_that_blow_up_in_the_last_step_are_noticed(split):
    def poison(state):
        if state.step == state.steps - 1:
            next(state.network.parameters()).data.fill_(float("inf"))

    with pytest.raises(TrainingDiverged, match="weights hold NaN or Inf"):
        train(Dropping(), split, settings=settings(epochs=1), hooks=[Hook(after_step=poison)])


def test_hooks_are_called_in_the_order_of_a_step(split):
    calls = []
    stages = ("before_step", "after_backward", "after_step", "after_epoch")
    functions = {stage: lambda state, stage=stage: calls.append(stage) for stage in stages}

    def penalty(state):
        calls.append("penalty")
        return 0.0 * next(state.network.parameters()).sum()

    steps = len(split) // 64
    train(Dropping(), split, settings=settings(epochs=1), hooks=[Hook(penalty=penalty, **functions)])
    assert calls == ["before_step", "penalty", "after_backward", "after_step"] * steps + ["after_epoch"]


def test_the_memory_of_a_hook_is_part_of_the_checkpoint(split, tmp_path):
    def counting():
        memory = {"steps": torch.zeros(())}
        return memory, Hook(after_step=lambda state: memory["steps"].add_(1), tensors=memory)

    def interrupt(done, total, note):
        if done == total - 1:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.safetensors"
    _, hook = counting()
    with pytest.raises(KeyboardInterrupt):
        train(Dropping(), split, settings=settings(), hooks=[hook], checkpoint=path, progress=interrupt)
    second, hook = counting()
    train(Dropping(), split, settings=settings(), hooks=[hook], checkpoint=path)
    assert second["steps"] == 3 * (len(split) // 64)


def test_adam_for_some_parameters_is_that_of_torch_and_the_others_keep_sgd():
    network, twin = (nn.Linear(3, 2) for _ in range(2))
    twin.load_state_dict(network.state_dict())
    hook = adam({"weight": network.weight}, share=0.5)
    expected = torch.optim.Adam([twin.weight], lr=0.0)
    plain = torch.optim.SGD(network.parameters(), lr=0.2, weight_decay=0.1)
    for step, lr in enumerate((0.2, 0.1, 0.05)):
        x = torch.randn(8, 3, generator=generator(step))
        for one in (network, twin):
            one.zero_grad()
            one(x).square().mean().backward()
        expected.param_groups[0]["lr"] = lr / 2
        expected.step()
        bias = network.bias.detach().clone()
        hook.after_backward(TrainingState(network, plain, 3, lr=lr))
        assert network.weight.grad is None
        plain.step()
        assert not torch.equal(network.bias, bias)
        with torch.no_grad():
            twin.bias.copy_(network.bias)
    torch.testing.assert_close(network.weight, twin.weight)


def test_a_training_with_adam_resumes_to_the_same_network(split, tmp_path):
    def trained(path, progress=None):
        torch.manual_seed(0)
        network = Dropping()
        hook = adam({"first": next(network.parameters())}, share=0.1)
        file = tmp_path / f"{path}.safetensors"
        train(network, split, settings=settings(), hooks=[hook], checkpoint=file, progress=progress)
        return state_of(network)

    def interrupt(done, total, note):
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained("stopped", interrupt)
    assert same(trained("stopped"), trained("whole"))


def answering(*rows):
    """A network with these logits whatever it reads."""
    network = nn.Linear(1, len(rows[0])).requires_grad_(False)
    network.forward = lambda x: torch.tensor(rows)
    return network


def test_a_teacher_s_share_of_the_loss_by_hand():
    three = torch.tensor(3.0).log().item()
    logits = torch.tensor([[0.0, three]], requires_grad=True)  # a softmax of 1/4, 3/4; the teacher says 3/4, 1/4
    plain, network = torch.optim.SGD([logits]), nn.Linear(1, 1)
    state = TrainingState(network, plain, 1, images=torch.ones(1, 1), logits=logits, loss=torch.tensor(0.5))
    penalty = distillation(answering([three, 0.0]), share=0.5).penalty(state)
    soft = torch.tensor(4.0).log() - three / 4
    assert penalty.item() == pytest.approx(0.5 * (soft - 0.5).item())
    penalty.backward()
    torch.testing.assert_close(logits.grad, 0.5 * torch.tensor([[1 / 4 - 3 / 4, 3 / 4 - 1 / 4]]))
    # Twice as warm, logits are halved: a softmax of 1 to the root of 3. The gradient is T (q - p), not (q - p) / T.
    logits.grad, root = None, 3**0.5
    distillation(answering([three, 0.0]), share=1, temperature=2).penalty(state).backward()
    torch.testing.assert_close(logits.grad, 2 * torch.tensor([[1 - root, root - 1]]) / (1 + root))


def test_a_student_learns_from_its_teacher_where_labels_say_nothing(split):
    teacher = make_network("cnn", classes=10, channels=1, side=8)
    train(teacher, split, settings=settings(epochs=8))
    teacher.train()
    before = state_of(teacher)
    wrong = dataclasses.replace(split, labels=(split.labels + 1) % 10)
    seen = []
    watch = Hook(before_step=lambda state: seen.append((state.images.shape, state.labels.shape)))
    student = make_network("cnn", classes=10, channels=1, side=8, seed=1)
    train(student, wrong, settings=settings(epochs=8), hooks=[watch, distillation(teacher, share=1)])
    assert same(state_of(teacher), before)
    assert teacher.training
    assert set(seen) == {((64, 1, 8, 8), (64,))}
    images, labels = split.take(len(split))
    with torch.no_grad():
        assert (student(images).argmax(1) == labels).float().mean() > 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [({"share": -0.1}, "share is"), ({"share": 1.1}, "share is"), ({"share": 1, "temperature": 0.0}, "temperature is")],
)
def test_a_distillation_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        distillation(nn.Linear(1, 1), **options)


def test_a_penalty_on_the_weights_makes_them_smaller(split):
    def size(hooks):
        network = make_network("cnn", classes=10, channels=1, side=8)
        train(network, split, settings=settings(), hooks=hooks)
        return float(network.linear.weight.detach().square().sum())

    assert size([Hook(penalty=lambda state: state.network.linear.weight.square().sum())]) < 0.5 * size([])


def test_an_empty_split_is_refused(split):
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = dataclasses.replace(split, indices=nothing, labels=nothing)
    with pytest.raises(ValueError, match="split is empty"):
        train(Dropping(), empty, settings=settings())


def environment(tmp_path):
    return {**os.environ, "PRUNE_ENV_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "digit-cnn"], "did you mean 'digits-cnn'"),
        (["--lr", "nan"], "lr is nan"),
        (["--start", "none.safetensors"], "none.safetensors does not exist"),
        (["--epochs", "2", "--lr", "1e30"], "try a smaller lr"),
    ],
)
def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    from prune_env.tasks.training.__main__ import main

    monkeypatch.setenv("PRUNE_ENV_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == (1 if "1e30" in arguments else 2)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_file(tmp_path):
    files = []
    for name in ("whole", "killed"):
        root = tmp_path / name
        command = [*COMMAND, "--epochs", "20"]
        if name == "killed":
            process = subprocess.Popen(command, env=environment(root), stderr=subprocess.DEVNULL)
            while not list(root.glob("dense/*/checkpoint.safetensors")) and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not list(root.glob("dense/*/model.safetensors"))
        subprocess.run(command, env=environment(root), check=True, capture_output=True)
        (folder,) = root.glob("dense/*")
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "model.safetensors", "settings.json"]
        files.append([(folder / part).read_bytes() for part in ("model.safetensors", "settings.json")])
    assert files[0] == files[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of glibc")
@pytest.mark.parametrize("answer", [1, 0])
def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch, answer):
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *to: asked.append(to) or answer))
    assert keep_freed_memory() is bool(answer)
    assert [name for name, _ in asked] == [-3, -1]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert keep_freed_memory() is False
