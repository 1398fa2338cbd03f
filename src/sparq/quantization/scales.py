"""Modules whose scales stay float32 when the model changes its type."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn


class KeepsScales(nn.Module):
    """A module with buffers that are float32 by definition: `model.to(torch.bfloat16)` moves them, but rounds nothing.

    Attributes:
        SCALES: names of these buffers, which may be None.
    """

    SCALES: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsScales":
        scales = {name: getattr(self, name) for name in self.SCALES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in scales.items():
            after = getattr(self, name)
            if after is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self
