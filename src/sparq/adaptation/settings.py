"""What a low-rank adaptation is made of: the settings, their checks, and the papers' two choices."""

from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedModel

from sparq.errors import SparqError, near_matches
from sparq.models.families import family_of

Base = Literal["int8", "nf4", "nf4-double"]
"""What a frozen base is kept in: 8 bits, one scale a row (LLM.int8(), Dettmers et al. 2022); 4 bits, one scale for
every 64 weights (NF4; QLoRA, Dettmers et al. 2023); the same with those scales in 8 bits (double quantization)."""

Initialization = Literal["kaiming", "pissa", "olora", "eva", "loftq"]
"""What B A starts from; `kaiming` has A random and B zero."""

Preset = Literal["paper", "table11"]
"""The papers' settings: of the experiments (appendix E.1), and of the parameter counts (table 11)."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA: y = W x + s B A x with W frozen, and its variants; s = alpha / rank (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: r; the papers' appendix has 256.
        alpha: the papers' appendix has 256.
        dropout: on the adapters' input; the papers have 0.05.
        targets: names of linear layers; empty takes the family's q, k, v, o and MLP, as the papers do.
        rslora: s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        dora: each row of W + s B A is scaled to a length that is trained too (Liu et al. 2024, arXiv 2402.09353).
        initialization: what B A starts from; `sparq.adaptation.initialization` and `.loftq` have the formulas.
        base: what W is kept in; None keeps it in floating point.
        loftq_iterations: rounds of LoftQ; 5 in its paper.
    """

    rank: int = 256
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    initialization: Initialization = "kaiming"
    base: Base | None = None
    loftq_iterations: int = 5

    @property
    def scaling(self) -> float:
        """The factor s."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @property
    def reads_weights(self) -> bool:
        """Whether adapters or base are computed from the weights, which should be in float32 then."""
        return self.base is not None or self.initialization in ("pissa", "olora")

    def validate(self) -> None:
        """Check values and combinations.

        Raises:
            SparqError: a value is out of its range, or two contradict each other.
        """
        for name in ("rank", "alpha", "loftq_iterations"):
            if getattr(self, name) < 1:
                raise SparqError(f"LoRA {name} is {getattr(self, name)}: expected at least 1")
        if not 0 <= self.dropout < 1:
            raise SparqError(f"LoRA dropout is {self.dropout}: expected at least 0 and less than 1")
        if self.initialization not in get_args(Initialization):
            raise SparqError(
                f"LoRA initialization is {self.initialization!r}: "
                + near_matches(self.initialization, get_args(Initialization))
            )
        if self.base is not None and self.base not in get_args(Base):
            raise SparqError(f"LoRA base is {self.base!r}: {near_matches(self.base, get_args(Base))}")
        if self.initialization == "loftq" and self.base is None:
            raise SparqError("LoRA initialization 'loftq' makes up for a quantized base: expected a base, int8 or nf4")
        if self.initialization in ("pissa", "olora") and self.base is not None:
            raise SparqError(
                f"LoRA initialization {self.initialization!r} is for a base in floating point, not {self.base!r}:"
                " expected kaiming, eva or loftq"
            )


def lora_preset(name: Preset, model: PreTrainedModel) -> LoraSettings:
    """Return the papers' settings for a model.

    `paper` is SpARQ's appendix E.1: rank and alpha 256, dropout 0.05, on q, k, v, o and the MLP. `table11` is what the
    counts of its table 11 are of: rank 128 and alpha 256 (section 4.2), on q, k, v and o alone.

    Raises:
        SparqError: there is no such preset, or the family is not supported.
    """
    if name not in get_args(Preset):
        raise SparqError(f"LoRA preset is {name!r}: {near_matches(name, get_args(Preset))}")
    if name == "paper":
        return LoraSettings()
    family = family_of(model)
    attention = tuple(path.rpartition(".")[2] for path in family.linears if path.startswith(f"{family.attention}."))
    return LoraSettings(rank=128, alpha=256, targets=attention)
