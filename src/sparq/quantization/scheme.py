"""What a post-training quantization does, as one validated value."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sparq.errors import SparqError, unknown

Method = Literal["rtn", "smoothquant"]
Granularity = Literal["token", "tensor"]

METHODS: tuple[Method, ...] = get_args(Method)
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

FLOAT_BITS = 16
"""The number of bits that means: left in the floating-point type that the model has."""

EMBEDDING_GROUPS: dict[int, int | None] = {4: 32, 8: None}
"""The bits that embedding and head may have, and how many channels then share a scale; None is a whole row."""

BITS: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, FLOAT_BITS)


@dataclass(frozen=True, kw_only=True)
class QuantizationScheme:
    """The settings of one post-training quantization.

    Attributes:
        method: `rtn` (round to nearest) or `smoothquant` (Xiao et al. 2023, arXiv 2211.10438, section 4).
        weight_bits: 2 to 8, or 16 to leave the weights as they are.
        activation_bits: 2 to 8, or 16 to leave the inputs of the linear layers as they are.
        group_size: input features that share one weight scale; None is one scale per output channel.
        weight_symmetric: weights without a zero point (SmoothQuant's setting).
        activation_symmetric: activations without a zero point (SmoothQuant's setting).
        activation_granularity: which values share a scale, which is always computed at run time: one `token`,
            or the whole `tensor`. With `tensor` the result for a sequence depends on what else is in the
            batch, padding included, so the default is `token`.
        smoothing_alpha: SmoothQuant's migration strength, 0 (all difficulty stays in the activations) to 1
            (all of it goes into the weights); 0.5 is the paper's value for OPT (section 5.1). `rtn` does not
            read it.
        embedding_bits: 8 or 4 for the embedding and the head, rounded to the nearest integer by any method, or 16 to
            leave them as they are. Their inputs are not quantized.
    """

    method: Method
    weight_bits: int
    activation_bits: int
    group_size: int | None = None
    weight_symmetric: bool = True
    activation_symmetric: bool = True
    activation_granularity: Granularity = "token"
    smoothing_alpha: float = 0.5
    embedding_bits: int = FLOAT_BITS

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("quantization method", str(self.method), METHODS)
        if self.activation_granularity not in GRANULARITIES:
            raise unknown("activation granularity", str(self.activation_granularity), GRANULARITIES)
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
                raise SparqError(f"{name} is {bits!r}; it must be 2 to 8, or 16 for no quantization")
        if isinstance(self.embedding_bits, bool) or self.embedding_bits not in (*EMBEDDING_GROUPS, FLOAT_BITS):
            raise SparqError(f"embedding_bits is {self.embedding_bits!r}; it must be 4, 8, or 16 for no quantization")
        for name in ("weight_symmetric", "activation_symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise SparqError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise SparqError(f"group_size is {size!r}; it must be a positive number of input features, or null")
        alpha = self.smoothing_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise SparqError(f"smoothing_alpha is {alpha!r}; it must be a number from 0 to 1")

    @property
    def name(self) -> str:
        """Return the short name, for example `w4a4-smoothquant`; it has only the bits and the method."""
        return f"w{self.weight_bits}a{self.activation_bits}-{self.method}"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationScheme":
        """Return the scheme with the given settings.

        Raises:
            SparqError: a key is unknown, a required one is missing, or a value is out of its range.
        """
        fields = dataclasses.fields(cls)
        for key in values:
            if key not in {field.name for field in fields}:
                raise unknown("quantization setting", str(key), [field.name for field in fields])
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in values:
                raise SparqError(f"the quantization setting {field.name!r} is missing")
        return cls(**values)
