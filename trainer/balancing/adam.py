"""Adam on one vector, with its whole state in a dict of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


class VectorAdam:
    """Adam (Kingma and Ba) with L2 decay added to the gradient, as ``torch.optim.Adam(weight_decay=...)`` does it."""

    def __init__(self, like: Tensor, lr: float, decay: float = 0.0) -> None:
        self.lr = lr
        self.decay = decay
        self.state: dict[str, Tensor] = {
            "steps": torch.zeros((), dtype=like.dtype, device=like.device),
            "mean": torch.zeros_like(like),
            "square": torch.zeros_like(like),
        }

    def step(self, vector: Tensor, gradient: Tensor) -> Tensor:
        """The vector after one descent step."""
        gradient = gradient + self.decay * vector
        steps = self.state["steps"] + 1
        mean = 0.9 * self.state["mean"] + 0.1 * gradient
        square = 0.999 * self.state["square"] + 0.001 * gradient**2
        self.state = {"steps": steps, "mean": mean, "square": square}
        return vector - self.lr * (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
