"""The outlier figures as the code of Hu et al. 2024a (OutEffHop) computes them, for comparison with its tables."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.evaluation.observation import evaluating, final_norm_of
from sparq.models.families import decoder_blocks, family_of

EPSILON = 1e-6
KURTOSIS_BATCHES = 101
"""Only so many batches count for the kurtosis; the norms count them all."""


@dataclass(frozen=True, kw_only=True)
class OutEffHopOutliers:
    """What the published recipe gives, with its peculiarities.

    The tensors are the outputs of each block, of its attention's output projection, its second MLP layer and its two
    norms, and of the final norm: 5 * layers + 1, so 61 in OPT-125m. A row is one sequence, length * hidden numbers,
    padding and all; where transformers runs OPT's MLP on all tokens of a batch at once (its norm and its second
    layer), a row is one token. A row's kurtosis is E[(x - mu)^4] / (s^4 + 1e-6) with s the sample standard deviation
    (n - 1 in the denominator), over the first 101 batches. Means over rows come first, then the maximum or the mean
    over tensors.

    Attributes:
        inf_norm: max |x| of a row, averaged over rows, by name of the module.
        kurtosis: likewise.
        blocks: names of the decoder blocks.
    """

    inf_norm: dict[str, float]
    kurtosis: dict[str, float]
    blocks: tuple[str, ...]

    @property
    def max_inf_norm(self) -> float:
        """Largest over all tensors."""
        return max(self.inf_norm.values())

    @property
    def max_layer_inf_norm(self) -> float:
        """Largest over the outputs of blocks."""
        return max(self.inf_norm[name] for name in self.blocks)

    @property
    def avg_kurtosis(self) -> float:
        """Mean over all tensors."""
        return sum(self.kurtosis.values()) / len(self.kurtosis)


@dataclass
class _Average:
    total: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        self.total[name] = self.total.get(name, 0.0) + float(values.double().sum())
        self.count[name] = self.count.get(name, 0) + len(values)

    def means(self) -> dict[str, float]:
        return {name: total / self.count[name] for name, total in self.total.items()}


@torch.no_grad()
def outeffhop_outliers(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> OutEffHopOutliers:
    """Measure outliers by the published recipe; `measure_outliers(model, batches, compat="outeffhop")` calls this.

    Raises:
        SparqError: there are no batches.
    """
    family = family_of(model)
    named: dict[str, nn.Module] = {}
    for index, block in enumerate(decoder_blocks(model)):
        prefix = f"{family.blocks}.{index}"
        named[prefix] = block
        projection = [name for name in family.linears if name.startswith(f"{family.attention}.")][-1]
        for name in (projection, family.linears[-1], *(group.norm for group in family.norm_groups)):
            named[f"{prefix}.{name}"] = block.get_submodule(name)
    blocks = tuple(f"{family.blocks}.{index}" for index in range(len(decoder_blocks(model))))
    final = final_norm_of(model)
    if final is not None:
        named["final norm"] = final
    norms, kurtoses = _Average(), _Average()
    number = 0

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            x = (output[0] if isinstance(output, tuple) else output).float()
            x = x.reshape(len(x), -1)
            norms.add(name, x.abs().amax(dim=1))
            if number < KURTOSIS_BATCHES:
                deviation = x - x.mean(dim=1, keepdim=True)
                kurtoses.add(name, deviation.pow(4).mean(dim=1) / (x.std(dim=1).pow(4) + EPSILON))

        return hook

    with ExitStack() as stack:
        for name, module in named.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        stack.enter_context(evaluating(model))
        for batch in batches:
            model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False)
            number += 1
    if number == 0:
        raise SparqError("cannot measure outliers without a batch")
    return OutEffHopOutliers(inf_norm=norms.means(), kurtosis=kurtoses.means(), blocks=blocks)
