"""How well a network does on some images: accuracy, loss and margin, each higher = better."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prune_env.number_format import autocast, number_format
from prune_env.pruning.measure import BATCH_SIZE, evaluating


@torch.no_grad()
def quality(
    network: nn.Module, images: Float[Tensor, "image ..."], labels: Int64[Tensor, " image"]
) -> dict[str, float]:
    """Accuracy, minus the mean cross-entropy in nats, and the mean margin, all higher = better.

    The margin is the logit of the right class above the largest other one: the output margin of Jiang et al.,
    Predicting the Generalization Gap with Margin Distributions (ICLR 2019, arXiv 1810.00113), not divided by gradients.

    Args:
        network: Measured in evaluation mode.
        images: `[n, ...]` as `prepare_images` lays them out.
        labels: `[n]` classes.
    """
    with evaluating(network), autocast(images.device, number_format(network, images)):
        logits = torch.cat([network(batch).float() for batch in images.split(BATCH_SIZE)])
    right = logits.gather(1, labels[:, None])[:, 0]
    best_other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return {
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "neg_loss": -float(cross_entropy(logits, labels)),
        "margin": float((right - best_other).mean()),
    }
