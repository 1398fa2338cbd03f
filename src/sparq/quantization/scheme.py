"""What a post-training quantization does, as one validated value."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from sparq.errors import SparqError, unknown
from sparq.quantization.grid import WEIGHT_RANGES, Grid, WeightRange, weight_grid
from sparq.quantization.presets import defaults

Method = Literal["rtn", "smoothquant", "omniquant", "affinequant", "gptq", "rotation", "best"]
Granularity = Literal["token", "tensor", "group", "channel"]
Rounding = Literal["nearest", "gptq"]

METHODS: tuple[Method, ...] = get_args(Method)
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

FLOAT_BITS = 16
"""The number of bits that means: left in the floating-point type that the model has."""

EMBEDDING_GROUPS: dict[int, int | None] = {4: 32, 5: None, 6: None, 7: None, 8: None}
"""The bits that embedding and head may have, and how many channels then share a scale; None is a whole row."""

_REALS = (
    ("smoothing_alpha", 0.0, 1.0),
    ("weight_tail", 0.0, 0.5),
    ("activation_tail", 0.0, 0.5),
    ("activation_clip", 0.0, 1.0),
    ("gptq_damping", 0.0, 1.0),
    ("change_rate", 0.0, 1.0),
    ("clipping_rate", 0.0, 1.0),
    ("stability", 0.0, 1.0),
    ("scale_rate", 0.0, 1.0),
    ("low_rank_rate", 0.0, 1.0),
)
_MAY_BE_ZERO = ("smoothing_alpha",)

LAYER_SETTINGS = ("weight_bits", "activation_bits", "activation_clip")
"""What can differ between the layers of a model."""

_ATTENTION_BITS = ("query_bits", "key_bits", "value_bits", "probability_bits")

BITS: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, FLOAT_BITS)


@dataclass(frozen=True, kw_only=True)
class QuantizationScheme:
    """The settings of one post-training quantization.

    Attributes:
        method: `rtn` (round to nearest), `smoothquant` (Xiao et al. 2023, arXiv 2211.10438, section 4), `omniquant`
            (Shao et al. 2023, arXiv 2308.13137), `affinequant` (Ma et al. 2024, arXiv 2403.12544), `gptq` (Frantar et
            al. 2023, arXiv 2210.17323), `rotation` (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456) or `best`
            (rotation and GPTQ, then scales trained against the float model: `quantization/distillation.py`).
        weight_bits: 2 to 8, or 16 to leave the weights as they are.
        activation_bits: 2 to 8, or 16 to leave the inputs of the linear layers as they are.
        group_size: input features that share one weight scale; None is one scale per output channel.
        weight_symmetric: weights without a zero point (SmoothQuant's setting).
        activation_symmetric: activations without a zero point (SmoothQuant's setting).
        activation_granularity: which values share a scale: one `token`, `group_size` channels of a token (`group`), or
            the whole `tensor`. They are computed at run time, so with `tensor` the result for a sequence depends on
            what else is in the batch, padding included, unless `activation_static` is given. `channel` divides each
            channel by its largest magnitude on calibration data first, and then is a static `tensor`.
        activation_static: fix the range of a `tensor` on calibration data: `max`, `percentile` or `mse`, see
            `sparq.quantization.static_ranges`; None for ranges at run time.
        activation_tail: share of the activations that `percentile` leaves out; others do not read it.
        smoothing_alpha: SmoothQuant's migration strength, 0 (all difficulty stays in the activations) to 1
            (all of it goes into the weights); 0.5 is the paper's value for OPT (section 5.1). `rtn` does not
            read it.
        rounding: `nearest`, or `gptq`; None is what the method is known for: `gptq` for itself, `rotation` and the
            start of `best`, else `nearest`.
        weight_range: how far a grid of weights reaches, `max`, `mse` or `percentile`; see `weight_grid`.
        weight_tail: share of the weights that `percentile` clips (the papers' 1 % and 5 %); others do not read it.
        activation_clip: share of each token's range that its integers cover, more than 0 and at most 1.
        gptq_damping: share of the mean squared input that GPTQ adds to each; nothing else reads it.
        epochs: passes over the calibration data, of `omniquant` and `affinequant` for every block, of `best` in all.
        change_rate: their learning rate of equivalent changes.
        clipping_rate: their learning rate of weight clipping.
        stability: AffineQuant's factor on the off-diagonal elements of its matrices.
        scale_rate: peak learning rate of what `best` multiplies the scales of weights by.
        low_rank: rank of what `best` trains beside the integers of every layer, in floating point; None for nothing.
        low_rank_rate: peak learning rate of it.
        seed: of random rotations, and of the order in which `best` sees the data.
        embedding_bits: 4 to 8 for the embedding and the head, rounded to the nearest integer by any method, or 16 to
            leave them as they are. Their inputs are not quantized.
        query_bits: 2 to 8 for the attention's queries, per token and head with a zero point, or 16; see
            `sparq.quantization.attention`.
        key_bits: likewise for the keys of the KV cache.
        value_bits: likewise for its values.
        probability_bits: 2 to 8 for the attention's probabilities, in fixed steps from 0 to 1, or 16.
        attention_group_size: channels of a head's query, key or value that share a scale; None is the whole head.
        key_rotation: multiply queries and keys by a Hadamard matrix before they are quantized; nothing if neither is.
        layers: settings of single layers that differ, by the layer's full name: `weight_bits`, `activation_bits` and
            `activation_clip`. Bits stay 2 to 8 where they are so in the scheme, and 16 where they are 16.
    """

    method: Method
    weight_bits: int
    activation_bits: int
    group_size: int | None = None
    weight_symmetric: bool = True
    activation_symmetric: bool = True
    activation_granularity: Granularity = "token"
    activation_static: WeightRange | None = None
    activation_tail: float = 0.001
    smoothing_alpha: float = 0.5
    rounding: Rounding | None = None
    weight_range: WeightRange = "max"
    weight_tail: float = 0.01
    activation_clip: float = 1.0
    gptq_damping: float = 0.01
    epochs: int = 10
    change_rate: float = 5e-3
    clipping_rate: float = 1e-2
    stability: float = 0.01
    scale_rate: float = 7e-4
    low_rank: int | None = None
    low_rank_rate: float = 1e-3
    seed: int = 0
    embedding_bits: int = FLOAT_BITS
    query_bits: int = FLOAT_BITS
    key_bits: int = FLOAT_BITS
    value_bits: int = FLOAT_BITS
    probability_bits: int = FLOAT_BITS
    attention_group_size: int | None = None
    key_rotation: bool = False
    layers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("quantization method", str(self.method), METHODS)
        if self.activation_granularity not in GRANULARITIES:
            raise unknown("activation granularity", str(self.activation_granularity), GRANULARITIES)
        if self.weight_range not in WEIGHT_RANGES:
            raise unknown("weight range", str(self.weight_range), WEIGHT_RANGES)
        if self.activation_static is not None and self.activation_static not in WEIGHT_RANGES:
            raise unknown("static activation range", str(self.activation_static), WEIGHT_RANGES)
        if self.rounding is not None and self.rounding not in ROUNDINGS:
            raise unknown("rounding", str(self.rounding), ROUNDINGS)
        for name in ("weight_bits", "activation_bits", *_ATTENTION_BITS):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
                raise SparqError(f"{name} is {bits!r}; it must be 2 to 8, or 16 for no quantization")
        if isinstance(self.embedding_bits, bool) or self.embedding_bits not in (*EMBEDDING_GROUPS, FLOAT_BITS):
            raise SparqError(f"embedding_bits is {self.embedding_bits!r}; it must be 4 to 8, or 16 for no quantization")
        for name in ("weight_symmetric", "activation_symmetric", "key_rotation"):
            if not isinstance(getattr(self, name), bool):
                raise SparqError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        sizes = (("group_size", "input features"), ("attention_group_size", "channels"), ("low_rank", "columns"))
        for name, what in sizes:
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise SparqError(f"{name} is {size!r}; it must be a positive number of {what}, or null")
        for name, low, high in _REALS:
            value = getattr(self, name)
            real = isinstance(value, int | float) and not isinstance(value, bool)
            if not real or not low <= value <= high or (value == 0 and name not in _MAY_BE_ZERO):
                least = f"from {low:g}" if name in _MAY_BE_ZERO else f"more than {low:g}"
                raise SparqError(f"{name} is {value!r}; it must be a number {least} to {high:g}")
        for name, lowest in (("seed", 0), ("epochs", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise SparqError(f"{name} is {value!r}; it must be a whole number from {lowest} on")
        if self.learns and self.rounding == "gptq":
            raise SparqError(f"{self.method} learns its clipping with rounding to nearest: rounding cannot be 'gptq'")
        if self.learns and self.weight_range != "max":
            raise SparqError(
                f"{self.method} learns how far ranges reach, from nearly all of each: weight_range must be 'max', not"
                f" {self.weight_range!r}"
            )
        if self.low_rank is not None and not self.distills:
            raise SparqError(
                f"low_rank is for the method best with weights of 2 to 8 bits, not for {self.name}: leave it out"
            )
        if self.method == "best" and self.rounding == "nearest":
            raise SparqError("best trains the scales of GPTQ's integers: rounding cannot be 'nearest'")
        self._check_granularity()
        self._check_layers()

    def _check_layers(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise SparqError(f"layers is {self.layers!r}; it must map names of layers to settings")
        if self.layers and self.learns:
            raise SparqError(f"{self.method} trains whole blocks with one scheme: layers must be empty")
        for name, settings in self.layers.items():
            if not isinstance(settings, Mapping):
                raise SparqError(f"layers.{name} is {settings!r}; it must be settings such as weight_bits")
            for key, value in settings.items():
                if key not in LAYER_SETTINGS:
                    raise unknown(f"setting of layer {name}", str(key), LAYER_SETTINGS)
                if key != "activation_clip" and (value == FLOAT_BITS) != (getattr(self, key) == FLOAT_BITS):
                    raise SparqError(
                        f"{key} of layer {name} is {value!r} and that of the scheme {getattr(self, key)}: either"
                        " both or none can be 16"
                    )
            self.for_layer(name)

    def _check_granularity(self) -> None:
        granularity, static = self.activation_granularity, self.activation_static
        if granularity == "group" and self.group_size is None:
            raise SparqError(
                "activation_granularity 'group' shares group_size with the weights, but group_size is null"
            )
        if static is not None and granularity not in ("tensor", "channel"):
            raise SparqError(
                f"activation_static {static!r} fixes one range for all tokens: activation_granularity must be 'tensor'"
                f" or 'channel', not {granularity!r}"
            )
        if granularity == "channel" and static is None:
            raise SparqError(
                "activation_granularity 'channel' is static: set activation_static to max, percentile or mse"
            )
        if granularity == "channel" and self.method not in ("rtn", "gptq"):
            raise SparqError(
                f"activation_granularity 'channel' goes with rtn and gptq: {self.method} changes channels itself"
            )
        if (self.learns or self.distills) and static is not None:
            raise SparqError(f"{self.method} trains with ranges at run time: activation_static must be null")

    @property
    def compensates(self) -> bool:
        """Whether weights are rounded one after another, each making up for the ones before."""
        if self.weight_bits == FLOAT_BITS:
            return False
        return (self.rounding or ("gptq" if self.method in ("gptq", "rotation", "best") else "nearest")) == "gptq"

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at data."""
        return self.method == "smoothquant" or self.compensates or self.learns or self.fixes_ranges

    @property
    def fixes_ranges(self) -> bool:
        """Whether activations are quantized with ranges from calibration data."""
        return self.activation_static is not None and self.activation_bits != FLOAT_BITS

    @property
    def learns(self) -> bool:
        """Whether clipping and changes are trained."""
        return self.method in ("omniquant", "affinequant")

    @property
    def rotates(self) -> bool:
        """Whether stream, values and the MLP's last inputs get another basis."""
        return self.method in ("rotation", "best")

    @property
    def distills(self) -> bool:
        """Whether the scales of weights are trained against the float model."""
        return self.method == "best" and self.weight_bits != FLOAT_BITS

    @property
    def resumes(self) -> bool:
        """Whether an interrupted quantization can go on from what was kept: it takes minutes."""
        return self.compensates or self.learns

    @property
    def quantizes_attention(self) -> bool:
        """Whether anything inside of the attention is quantized."""
        return any(getattr(self, name) != FLOAT_BITS for name in _ATTENTION_BITS)

    def for_layer(self, name: str) -> "QuantizationScheme":
        """Return the scheme of one layer, by its full name."""
        return dataclasses.replace(self, **{**self.layers[name], "layers": {}}) if name in self.layers else self

    def grid(self, weight: Float[Tensor, "outputs inputs"]) -> Grid:
        """Return the grid of a weight matrix."""
        return weight_grid(
            weight,
            self.weight_bits,
            group_size=self.group_size,
            symmetric=self.weight_symmetric,
            reach=self.weight_range,
            tail=self.weight_tail,
        )

    @property
    def name(self) -> str:
        """Return the short name, for example `w4a4-smoothquant`; it has only the method and bits, the cache's too."""
        cache = f"kv{self.key_bits}" if self.key_bits == self.value_bits != FLOAT_BITS else ""
        return f"w{self.weight_bits}a{self.activation_bits}{cache}-{self.method}"

    def chosen(self) -> dict[str, Any]:
        """Return the settings that are not the fields' own defaults, so that a later field changes nothing of it."""
        own = {
            field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for field in dataclasses.fields(self)
        }
        return {name: value for name, value in self.to_dict().items() if value != own[name]}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationScheme":
        """Return the scheme with the given settings, the others as the method is known for: see `presets.defaults`.

        The key `preset` stands for the settings of a preset; what is given besides comes before it.

        Raises:
            SparqError: a key is unknown, a required one is missing, or a value is out of its range.
        """
        preset = values.get("preset")
        given = {key: value for key, value in values.items() if key != "preset"}
        fields = dataclasses.fields(cls)
        for key in given:
            if key not in {field.name for field in fields}:
                raise unknown("quantization setting", str(key), [field.name for field in fields])
        for field in fields:
            required = field.default is field.default_factory is dataclasses.MISSING
            if required and field.name not in given:
                raise SparqError(f"the quantization setting {field.name!r} is missing")
        grouped = given.get("activation_granularity") == "group"
        own = defaults(str(given["method"]), given["weight_bits"], given["activation_bits"], preset, grouped=grouped)
        return cls(**{**own, **given})
