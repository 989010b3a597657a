"""Unrolling: a network's operations in the order in which they run, found by torch.fx."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
from torch import fx, nn


class _Tracer(fx.Tracer):
    """Takes some kinds of modules for one operation each, beside torch's own."""

    def __init__(self, whole: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._whole) or super().is_leaf_module(m, module_qualified_name)


@contextmanager
def _shapes_unchecked() -> Iterator[None]:
    """Without jaxtyping's checks, where they are on: the tracer's stand-ins for tensors have no shape."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def operations(network: nn.Module, *, whole: tuple[type[nn.Module], ...] = ()) -> fx.GraphModule:
    """A network's operations in order, as its code runs in its present mode; its modules are shared.

    Args:
        network: Its code is run once, on stand-ins for tensors.
        whole: Kinds of modules that are one operation each, beside those of torch.nn.

    Raises:
        ValueError: Its control flow depends on its input.
    """
    try:
        with _shapes_unchecked():
            graph = _Tracer(whole).trace(network)
    except Exception as error:  # the tracer runs the network's own code, which may fail in any way
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the network cannot be walked layer by layer: {line}") from None
    return fx.GraphModule(network, graph)
