"""Several layers of one input as one layer, in a model whose code calls each of them."""

from collections.abc import Sequence

from torch import Tensor, nn


class SharedProduct:
    """The outputs of one product, handed out to the layers that it stands for.

    The first of them to be called with an input computes all outputs, and the others fetch theirs: they are computed
    again if the input is not the same tensor object. What has been fetched is not kept. A model is run by one thread.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.source: Tensor | None = None
        self.parts: dict[int, Tensor] = {}

    def fetch(self, index: int, linear: nn.Module, x: Tensor) -> Tensor:
        """Return output number `index` of `linear` for `x`.

        The first layer always computes, so that a tensor that was written to between two passes is seen.
        """
        if index == 0 or self.source is not x or index not in self.parts:
            self.source = x
            # Elementwise functions may round a strided row otherwise than one of its own; one token is not copied.
            self.parts = {i: part.contiguous() for i, part in enumerate(linear(x).split(self.sizes, -1))}
        part = self.parts.pop(index)
        if not self.parts:
            self.source = None
        return part

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedProduct":
        copied = SharedProduct(self.sizes)
        memo[id(self)] = copied
        return copied


class SharedLinear(nn.Module):
    """One of several layers that are computed together.

    Attributes:
        linear: all of them, one after the other; the same module in each.
        index: which one this is.
    """

    def __init__(self, linear: nn.Module, product: SharedProduct, index: int) -> None:
        super().__init__()
        self.linear = linear
        self.product = product
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return this layer's output."""
        return self.product.fetch(self.index, self.linear, x)
