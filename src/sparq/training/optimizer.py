"""Adam on float32 master weights, whatever type the model computes in."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adam import adam

Schedule = Literal["constant", "cosine"]

_GROUP = 1 << 23
"""Most numbers of a group, unless one parameter has more."""

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


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


class MasterAdam(torch.optim.Optimizer):
    """Adam whose moments and weights are float32; parameters of another type are rounded copies of its weights.

    bfloat16 has 8 bits of mantissa: a step of 1e-3 of a weight's size would be rounded away. Casting once an update is
    cheaper than casting each weight at each call, as mixed precision by autocast does. The moments and weights of a
    parameter that is sharded over processes are sharded like it.

    Args:
        parameters: what is trained.
        weight_decay: Adam's L2 term.
        betas: Adam's decay rates.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, weight_decay: float, betas: tuple[float, float]) -> None:
        super().__init__(list(parameters), {"lr": 0.0, "weight_decay": weight_decay, "betas": betas})

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained; sharding replaces the tensors that were given."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Return the float32 weight behind a parameter, itself if it is float32."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            weight = parameter.detach()
            state["master"] = weight if weight.dtype == torch.float32 else weight.float()
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(state["master"]) for _ in range(2))
        master: Tensor = state["master"]
        return master

    @torch.no_grad()
    def update(self, *, rate: float, gradient_scale: float, clip_norm: float) -> float:
        """Apply the accumulated gradients and clear them.

        Args:
            rate: learning rate.
            gradient_scale: factor on the gradients first (1 / number of target tokens).
            clip_norm: the norm that the scaled gradient is clipped to.

        Returns:
            The gradient's norm before clipping.
        """
        trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(_gradient(parameter, gradient_scale)) for parameter in trained]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # As `clip_grad_norm_` does it.
        coefficient = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        options = self.param_groups[0]
        options["lr"] = rate
        for group in _groups(trained):
            masters = [self.master(parameter) for parameter in group]
            gradients = [_gradient(parameter, gradient_scale) for parameter in group]
            for parameter in group:
                parameter.grad = None
            torch._foreach_mul_(gradients, coefficient)
            states = [self.state[parameter] for parameter in group]
            adam(
                masters,
                gradients,
                exp_avgs=[state["exp_avg"] for state in states],
                exp_avg_sqs=[state["exp_avg_sq"] for state in states],
                max_exp_avg_sqs=[],
                state_steps=[state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=options["betas"][0],
                beta2=options["betas"][1],
                lr=rate,
                weight_decay=options["weight_decay"],
                eps=1e-8,
                maximize=False,
            )
        self.copy_to_model()
        return float(norm)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the master weights into the model."""
        rounded: list[Tensor] = [p for p in self.parameters if p.dtype != torch.float32 and self.state[p]]
        if rounded:
            torch._foreach_copy_(rounded, [self.state[p]["master"] for p in rounded])

    def whole_state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return every tensor that the next step depends on, whole, given the names of the parameters.

        With sharded parameters every process has to call it.
        """
        tensors = {}
        for name, parameter in zip(names, self.parameters, strict=True):
            tensors[f"weight/{name}"] = _whole(self.master(parameter))
            tensors |= {f"{key}/{name}": _whole(self.state[parameter][key]) for key in _MOMENTS}
        return tensors

    def whole_weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the float32 weights, whole, likewise."""
        return {name: _whole(self.master(p)) for name, p in zip(names, self.parameters, strict=True)}

    @torch.no_grad()
    def load_whole_state(self, names: Iterable[str], tensors: dict[str, Tensor]) -> None:
        """Restore what `whole_state` returned; moments may be missing, then they stay."""
        for name, parameter in zip(names, self.parameters, strict=True):
            master = self.master(parameter)
            master.copy_(_like(tensors[f"weight/{name}"], master))
            for key in _MOMENTS:
                if f"{key}/{name}" in tensors:
                    own = self.state[parameter][key]
                    own.copy_(_like(tensors[f"{key}/{name}"], own))
        self.copy_to_model()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make an update as PyTorch's optimizers do: at the group's rate, with the gradients as they are.

        Unlike theirs it clears them, which an update has read by then.

        Args:
            closure: computes the loss and the gradients first.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update(rate=self.param_groups[0]["lr"], gradient_scale=1.0, clip_norm=math.inf)
        return loss


def _gradient(parameter: nn.Parameter, scale: float) -> Tensor:
    """Return a copy of a gradient in float32, scaled."""
    assert parameter.grad is not None
    return parameter.grad.float().mul_(scale) if parameter.dtype != torch.float32 else parameter.grad * scale


def _groups(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in groups of some size: gradients are float32 in one of them at a time."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        if group and sum(p.numel() for p in group) + parameter.numel() > _GROUP:
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(whole: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
