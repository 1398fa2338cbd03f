"""The records of `measure_outliers`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from sparq.evaluation.activation_sums import Reduction
from sparq.evaluation.token_groups import GroupOutliers


@dataclass(frozen=True, kw_only=True)
class AttentionFigures:
    """What attention does with its mass, over the heads of one layer or of all.

    Attributes:
        attention_mass: mean sum of a row of probabilities; 1 for softmax.
        first_token_share: mean probability of the first token, over rows with more than one key. It is not
            divided by the mass, so attention that does less on the whole has less of it.
        sink_rate: share of all probability that goes to sinks, over rows with more than one key. A sink is a
            token that receives more than 0.3 of what a head spends on a sequence. It is divided by the mass.
        attention_entropy: mean entropy in nats of a row divided by its mass, over rows with more than one
            key.
        max_logit: largest scaled query-key product that a query may see, before any normalization.
        first_value_norm: mean Euclidean norm of the first token's value, over heads and sequences.
        sink_value_norm: the same over sinks; None if there are none.
        other_value_norm: the same over tokens that are neither first nor a sink; None if there are none.
    """

    attention_mass: float
    first_token_share: float
    sink_rate: float
    attention_entropy: float
    max_logit: float
    first_value_norm: float
    sink_value_norm: float | None
    other_value_norm: float | None


@dataclass(frozen=True, kw_only=True)
class ModuleOutliers:
    """One tensor inside a block.

    Attributes:
        max_inf_norm: max |x| over all its elements.
        mean_inf_norm: max |x| of each sequence, averaged over sequences.
        kurtosis: its kurtosis, with the reduction of the report.
    """

    max_inf_norm: float
    mean_inf_norm: float
    kurtosis: float


@dataclass(frozen=True, kw_only=True)
class LayerOutliers(ModuleOutliers, AttentionFigures):
    """The output of one decoder block, and its attention.

    Attributes:
        argmax_token_position: place of the largest element's token in its sequence, padding not counted.
        argmax_channel: place of the largest element in the hidden size.
    """

    argmax_token_position: int
    argmax_channel: int


@dataclass(frozen=True, kw_only=True)
class OutlierReport(AttentionFigures):
    """What `measure_outliers` found. Padding counts nowhere.

    Attributes:
        max_inf_norm: max |x| over all elements of the outputs of all blocks.
        mean_inf_norm: max |x| of each sequence, averaged over sequences, of the worst block: the "max layer
            inf norm" of the code of Bondarenko et al. 2023, which grows less with the amount of data.
        mean_kurtosis: kurtosis of the block outputs, averaged over blocks.
        final_norm_max_inf_norm: max |x| over the output of the final norm; None where there is none. It is
            apart since a learned gain may make it the largest of all, and hide the effect of attention.
        num_sequences: how many sequences were measured.
        num_tokens: how many tokens they have.
        reduction: whose elements one kurtosis was taken over.
        layers: the blocks from first to last.
        groups: the tokens of each group apart, if groups were given.
        modules: the outputs of the parts of blocks, by full name, if they were asked for: every linear layer and
            norm, and for an attention module what its heads add up, which its output projection reads. The
            output of an attention layer or an MLP as a whole is that of its last linear layer.
    """

    max_inf_norm: float
    mean_inf_norm: float
    mean_kurtosis: float
    final_norm_max_inf_norm: float | None
    num_sequences: int
    num_tokens: int
    reduction: Reduction
    layers: tuple[LayerOutliers, ...]
    groups: dict[str, GroupOutliers] = field(default_factory=dict)
    modules: dict[str, ModuleOutliers] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain lists, dictionaries and numbers, as JSON would give it back."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}
