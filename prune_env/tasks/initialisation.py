"""Initialisation of networks that are to be trained."""

from __future__ import annotations

from torch import nn


def initialise(network: nn.Module) -> None:
    """He initialisation (fan out) of convolutions and linear layers, zero biases; norms start as the identity.

    He et al., Delving Deep into Rectifiers (2015), section 2.2.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
