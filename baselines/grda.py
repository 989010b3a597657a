"""gRDA, generalised regularised dual averaging: SGD whose weights are the soft threshold of what it has accumulated.

Chao, Wang, Xing, Cheng, "Directional Pruning of Deep Neural Networks", NeurIPS 2020 (https://arxiv.org/abs/2006.09358);
the update as in the authors' code (github.com/donlan2710/gRDA-Optimizer, 03935f1), with gamma the learning rate and n
the number of the step, from 1. The code was read, the paper's text was not: its numbers of equations are not given.

    v_0 = w_0                                                        the weights that training starts from
    v_n = v_{n-1} - gamma_n grad f(w_{n-1}; Z_n)                     the dual: plain SGD, gradients taken at w
    w_n = sign(v_n) max(|v_n| - g_n, 0)                              gRDA, element by element
    g_n = c gamma^(1/2) (n gamma)^mu = c gamma^(1/2 + mu) n^mu       the tuning function at a constant rate
    g_n = g_{n-1} + c gamma_n^(1/2 + mu) (n^mu - (n-1)^mu), g_0 = 0  the same, summed step by step at any rate

The dual goes on growing under a weight that is zero, so that the weight can come back. No momentum and no decay. As
published all parameters take part, biases and norms too; a parameter group with c = 0 is left out, and is plain SGD.

Deviations: the threshold is summed in float64 (theirs: float32, in which a late step's rise is a few bits). Their Keras
file puts the current rate into the closed form, so that the threshold falls with the rate; that is not followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda value: 0 <= value < math.inf, "a finite number from 0"),
    "c": (lambda value: 0 <= value < math.inf, "a finite number from 0"),
    "mu": (lambda value: 0 < value < 1, "a number between 0 and 1 (the theory: above .5)"),
}
"""Constant -> whether a number is allowed, and which are."""


def check_constants(**constants: Any) -> None:
    """Refuse constants of gRDA that make no sense.

    Args:
        **constants: Names of `ALLOWED` and values.

    Raises:
        ValueError: Names the constant, its value and what is allowed.
    """
    for name, value in constants.items():
        fits, what = ALLOWED[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not fits(value):
            raise ValueError(f"{name} is {value!r}; allowed is {what}")


def rise(lr: float | int, *, mu: float, step: int) -> float:
    """What step n adds to the threshold per unit of c: gamma_n^(1/2 + mu) (n^mu - (n-1)^mu)."""
    return lr ** (0.5 + mu) * (step**mu - (step - 1) ** mu)


def strength(rates: Sequence[float], *, mu: float) -> float:
    """The threshold after some steps per unit of c, g_T / c.

    Args:
        rates: Learning rate of each step.
        mu: Exponent of the tuning function.
    """
    steps = np.arange(len(rates) + 1.0) ** mu
    return float(np.asarray(rates) ** (0.5 + mu) @ np.diff(steps))


def soft_threshold(dual: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """sign(v) max(|v| - g, 0), written so that NaN stays NaN: torch's sign of NaN is 0."""
    return dual - dual.clamp(-threshold, threshold)


class GRDA(Optimizer):
    """gRDA as published.

    The memory of a parameter, in `state`: `dual` (its shape), `step` and `threshold` (scalars). The weights are a
    function of it: what else changes them is undone by the next step.

    Args:
        params: Parameters, or groups of them with constants of their own.
        lr: Learning rate gamma; may change from step to step.
        c: Size of the threshold; 0 is plain SGD.
        mu: Its growth with the number of steps.

    Raises:
        ValueError: A constant that is not allowed; names it.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float | int,
        c: float | int,
        mu: float | int,
    ) -> None:
        super().__init__(params, {"lr": lr, "c": c, "mu": mu})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with constants of their own.

        Args:
            param_group: `params` and any of `lr`, `c` and `mu`.

        Raises:
            ValueError: A constant that is not allowed; names it.
        """
        check_constants(**{name: param_group.get(name, self.defaults[name]) for name in ALLOWED})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient.

        Args:
            closure: Computes the loss anew, and its gradients.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._accumulate(parameter, parameter.grad, group)
                    moved.append(parameter)
        self._write(moved)
        return loss

    def _accumulate(self, parameter: nn.Parameter, gradient: Tensor, constants: Mapping[str, Any]) -> None:
        """The dual and the threshold of the next step."""
        memory, lr = self._memory(parameter), constants["lr"]
        memory["step"] += 1
        memory["threshold"] += constants["c"] * rise(lr, mu=constants["mu"], step=int(memory["step"]))
        memory["dual"].add_(gradient, alpha=-lr)

    def _memory(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        memory = self.state[parameter]
        if not memory:
            memory["step"] = torch.zeros((), dtype=torch.int64)
            memory["threshold"] = torch.zeros((), dtype=torch.float64)
            memory["dual"] = parameter.detach().clone()
        return memory

    def _write(self, moved: Sequence[nn.Parameter]) -> None:
        """Weights from duals and thresholds."""
        for parameter in moved:
            memory = self.state[parameter]
            parameter.copy_(soft_threshold(memory["dual"], float(memory["threshold"])))
