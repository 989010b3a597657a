"""Fusion: convolution, norm, addition and rectifier run as one operation, so that a network is measured sooner.

A narrow convolution takes no longer than the norm, the addition and the rectifier behind it, each of which reads and
writes the whole map again. In evaluation mode a norm is a scale and a shift of each channel, so it goes into the
weights; the rest is what oneDNN's convolutions can do to a value before they write it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from prune_env.pruning.unrolling import operations

EXAMPLES = 2
"""Images on which the fused network is compared with the plain one."""

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Format -> how far apart their outputs may be, as a share of the outputs' norm. A wrong operation moves them by their
own size, and rounding through the hundred layers of a trained network by a few per cent in bfloat16."""


class Unary(NamedTuple):
    """A function of a value by the kernel's name for it, with its numbers and variant."""

    name: str | None = None
    numbers: tuple[float, ...] = ()
    variant: str = ""


RELU, RELU6 = Unary("relu"), Unary("hardtanh", (0.0, 6.0))

MODULES: Mapping[type[nn.Module], Callable[[Any], Unary]] = MappingProxyType(
    {
        nn.ReLU: lambda module: RELU,
        nn.ReLU6: lambda module: RELU6,
        nn.SiLU: lambda module: Unary("swish"),
        nn.Hardswish: lambda module: Unary("hardswish"),
        nn.LeakyReLU: lambda module: Unary("leaky_relu", (module.negative_slope,)),
        nn.GELU: lambda module: Unary("gelu", (), module.approximate),
    }
)
"""Kind of module -> what the kernel does in its place."""

FUNCTIONS: Mapping[Any, Unary] = MappingProxyType(
    {
        **dict.fromkeys((functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_"), RELU),
        functional.relu6: RELU6,
        functional.silu: Unary("swish"),
        functional.hardswish: Unary("hardswish"),
    }
)
"""Function, or name of a tensor's method -> the same, where it has nothing but its input and perhaps `inplace`."""

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
IN_PLACE = (operator.iadd, "add_")


def fused(network: nn.Module, images: Float[Tensor, "image ..."], dtype: torch.dtype) -> nn.Module:
    """A network in evaluation mode with its convolutions fused, or itself where that cannot be done faithfully.

    What cannot be fused: anything but a CPU, control flow that depends on the input, hooks, forward passes that leave
    something behind in a module, and whatever turns out to say something else on the first images.

    To be called as the network would be: without gradients, under the autocast of its forward passes.

    Args:
        network: In evaluation mode; neither it nor anything in it changes. The result shares its tensors.
        images: `[n, channel, height, width]` in the number format of the forward pass.
        dtype: That format.
    """
    if images.device.type != "cpu" or dtype not in TOLERANCES or not _available() or not _plain(network):
        return network
    try:
        return _Fusion(network, dtype).checked(images[:EXAMPLES])
    except Exception:  # the network's own code, copied and run on stand-ins, may fail in any way: then it runs as it is
        return network


def _available() -> bool:
    # Private in torch, where its compiler uses them; without them nothing is fused.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _plain(network: nn.Module) -> bool:
    """Whether calling a module is no more than running its forward pass, and there is something to fuse."""
    modules = list(network.modules())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return not hooked and any(_is(module, nn.Conv2d) for module in modules)


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very kind, its forward pass the kind's own."""
    return type(module) is kind and "forward" not in vars(module)


class FusedConvolution(nn.Module):
    """A convolution, with what stands behind it.

    Args:
        convolution: With zeros as padding, counted in pixels.
        norm: In evaluation mode.
        unary: What comes last.
        dtype: Number format of inputs, weights and outputs.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, unary: Unary, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = convolution.weight, convolution.bias
        if norm is not None and norm.running_mean is not None and norm.running_var is not None:
            weight, bias = fuse_conv_bn_weights(
                weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
        self.weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else bias.detach().to(dtype)
        placed = (convolution.padding, convolution.stride, convolution.dilation)
        self._options = (*map(list, placed), convolution.groups)
        self._unary = (unary.name, list(unary.numbers), unary.variant)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """`[n, channel, height, width]`; `other` of that shape is added before the last function."""
        x = x.to(self.weight.dtype)
        if other is None:
            name, *rest = self._unary
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self._options, name or "none", *rest
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, other.to(self.weight.dtype), self.weight, self.bias, *self._options, "add", 1.0, *self._unary
        )


class _Shapes(fx.Interpreter):
    """Notes the shape of each operation's result."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shape"] = result.shape if isinstance(result, Tensor) else None
        return result


class _Fusion:
    """One network on its way to being fused."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self._network, self._dtype = network, dtype
        # Structure of its own, tensors shared: stand-ins that code stores in modules are not left in the network.
        shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        twin = copy.deepcopy(network, shared)
        before = _holdings(twin)
        self._module = operations(twin)
        after = _holdings(twin)
        if any(new is not old or size != then for (new, size), (old, then) in zip(after, before, strict=True)):
            raise ValueError("its forward pass leaves something behind")

    def checked(self, images: Tensor) -> nn.Module:
        """The fused network, compared with the plain one on some images.

        Raises:
            ValueError: They differ.
        """
        _Shapes(self._module).run(images.clone())
        for node in list(self._module.graph.nodes):
            self._fuse(node)
        self._module.recompile()
        ours, theirs = (module(images.clone()).float() for module in (self._module, self._network))
        apart = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)
        if not apart <= TOLERANCES[self._dtype]:
            raise ValueError(f"its outputs are {apart:.2g} away")
        return self._module

    def _fuse(self, node: fx.Node) -> None:
        """Put one operation in the place of a convolution and what stands behind it."""
        convolution = self._called(node, nn.Conv2d)
        if convolution is None or isinstance(convolution.padding, str) or convolution.padding_mode != "zeros":
            return
        chain = [node]
        norm = self._norm(chain)
        other = self._addend(chain)
        unary = self._unary(chain, added=other is not None)
        name = f"fused_{node.name}"
        self._module.add_submodule(name, FusedConvolution(convolution, norm, unary, self._dtype))
        graph = self._module.graph
        with graph.inserting_before(chain[-1]):
            inputs = (node.args[0],) if other is None else (node.args[0], other)
            new = graph.call_module(name, inputs)
        new.meta["shape"] = chain[-1].meta["shape"]
        chain[-1].replace_all_uses_with(new)
        for old in reversed(chain):
            graph.erase_node(old)

    def _norm(self, chain: list[fx.Node]) -> nn.BatchNorm2d | None:
        following = _sole_user(chain[-1])
        norm = None if following is None else self._called(following, nn.BatchNorm2d)
        if following is None or norm is None or norm.training or norm.running_mean is None:
            return None
        chain.append(following)
        return norm

    def _addend(self, chain: list[fx.Node]) -> fx.Node | None:
        """What is added to the convolution's output, of the same shape."""
        last, following = chain[-1], _sole_user(chain[-1])
        if following is None or following.target not in ADDITIONS or following.kwargs or len(following.args) != 2:
            return None
        other = following.args[1] if following.args[0] is last else following.args[0]
        if not isinstance(other, fx.Node) or other.meta["shape"] != last.meta["shape"]:
            return None
        if following.target in IN_PLACE and following.args[0] is not last:
            return None  # it writes into what is added, which others may read
        chain.append(following)
        return other

    def _unary(self, chain: list[fx.Node], *, added: bool) -> Unary:
        """The function that comes last; behind an addition the kernel knows one only."""
        following = _sole_user(chain[-1])
        unary = None
        if following is not None and following.op == "call_module":
            module = self._module.get_submodule(str(following.target))
            unary = MODULES[type(module)](module) if any(_is(module, kind) for kind in MODULES) else None
        elif following is not None and len(following.args) == 1 and not following.kwargs.keys() - {"inplace"}:
            unary = FUNCTIONS.get(following.target)
        if following is None or unary is None or (added and unary != RELU):
            return Unary()
        chain.append(following)
        return unary

    def _called(self, node: fx.Node, kind: type[nn.Module]) -> Any:
        """The module that a node calls with nothing but its input, if it is of this kind."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self._module.get_submodule(str(node.target))
        return module if _is(module, kind) else None


def _sole_user(node: fx.Node) -> fx.Node | None:
    """The one operation that reads a node's result, and reads it once."""
    users = list(node.users)
    return users[0] if len(users) == 1 and list(users[0].args).count(node) == 1 else None


def _holdings(network: nn.Module) -> list[tuple[Any, int]]:
    """What all modules hold: which objects, and how many things are in each."""
    held = [value for module in network.modules() for value in vars(module).values()]
    return [(value, len(value) if isinstance(value, list | dict | set) else 0) for value in held]
