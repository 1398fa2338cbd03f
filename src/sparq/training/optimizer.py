"""Adam on float32 master weights, whatever dtype the model computes in."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Schedule = Literal["constant", "cosine"]


def learning_rate(update: int, *, peak: float, warmup: int, total: int, schedule: Schedule) -> float:
    """Return the rate of update number `update`, counted from 0.

    Linear warm-up to `peak` over `warmup` updates; then constant, or a half cosine down to peak / 50 at the end.
    """
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule == "constant":
        return peak
    share = min(1.0, (update - warmup) / max(1, total - warmup))
    return peak * max(0.02, 0.5 * (1 + math.cos(math.pi * share)))


class MasterAdam:
    """Adam whose state and weights are float32; the model's parameters are copies in the model's dtype.

    bfloat16 has 8 bits of mantissa: a step of 1e-3 of a weight's size would be rounded away. Casting once an update is
    cheaper than casting each adapter at each call, as mixed precision by autocast does.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, weight_decay: float, betas: tuple[float, float]) -> None:
        self.parameters = parameters
        self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in parameters.items()}
        self.adam = torch.optim.Adam(list(self.masters.values()), weight_decay=weight_decay, betas=betas, fused=True)

    def step(self, *, rate: float, gradient_scale: float, clip_norm: float) -> float:
        """Apply the accumulated gradients and clear them.

        Args:
            rate: learning rate.
            gradient_scale: factor on the gradients first (1 / number of target tokens).
            clip_norm: the norm that the scaled gradient is clipped to.

        Returns:
            The gradient's norm before clipping.
        """
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            self.masters[name].grad = None if gradient is None else gradient.float().mul_(gradient_scale)
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(list(self.masters.values()), clip_norm)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.copy_to_model()
        return float(norm)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the master weights into the model."""
        torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that the next step depends on, by name."""
        tensors = {f"weight/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"weight/{name}"])
            state = {
                key: tensors[f"{key}/{name}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in tensors
            }
            if state:
                self.adam.state[master] = state
        self.copy_to_model()
