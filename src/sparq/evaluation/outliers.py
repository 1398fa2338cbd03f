"""The outliers of a model: norm and kurtosis of its layer outputs, and the sinks of its attention."""

import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from sparq.errors import SparqError, unknown
from sparq.evaluation.attention_statistics import AttentionSums
from sparq.evaluation.moments import Moments, kurtosis
from sparq.evaluation.observation import observe
from sparq.evaluation.token_groups import GroupOutliers, GroupSums
from sparq.models.families import decoder_blocks
from sparq.progress import progress

Reduction = Literal["sequence", "tensor", "token"]
"""Whose elements one kurtosis is taken over: those of a sequence, of the whole data, or of one token."""


@dataclass(frozen=True, kw_only=True)
class LayerOutliers:
    """One decoder block; the attributes mean what they mean in `OutlierReport`.

    Attributes:
        argmax_token_position: place of the largest element's token in its sequence, padding not counted.
        argmax_channel: place of the largest element in the hidden size.
    """

    max_inf_norm: float
    mean_inf_norm: float
    kurtosis: float
    attention_mass: float
    first_token_share: float
    argmax_token_position: int
    argmax_channel: int


@dataclass(frozen=True, kw_only=True)
class OutlierReport:
    """What `measure_outliers` found. Padding counts nowhere.

    Attributes:
        max_inf_norm: max |x| over all elements of the outputs of all blocks.
        mean_inf_norm: max |x| of each sequence, averaged over sequences, of the worst block: the "max layer
            inf norm" of the code of Bondarenko et al. 2023, which grows less with the amount of data.
        mean_kurtosis: kurtosis of the block outputs, averaged over blocks.
        final_norm_max_inf_norm: max |x| over the output of the final norm; None where there is none. It is
            apart since a learned gain may make it the largest of all, and hide the effect of attention.
        attention_mass: mean sum of a row of probabilities; 1 for softmax.
        first_token_share: mean probability of the first token, over rows with more than one key. It is not
            divided by the mass, so attention that does less on the whole has less of it.
        sink_rate: share of all probability that goes to sinks, over rows with more than one key. A sink is a
            token that receives more than 0.3 of what a head spends on a sequence. It is divided by the mass.
        attention_entropy: mean entropy in nats of a row divided by its mass, over rows with more than one
            key.
        num_sequences: how many sequences were measured.
        num_tokens: how many tokens they have.
        reduction: whose elements one kurtosis was taken over.
        layers: the blocks from first to last.
        groups: the tokens of each group apart, if groups were given.
    """

    max_inf_norm: float
    mean_inf_norm: float
    mean_kurtosis: float
    final_norm_max_inf_norm: float | None
    attention_mass: float
    first_token_share: float
    sink_rate: float
    attention_entropy: float
    num_sequences: int
    num_tokens: int
    reduction: Reduction
    layers: tuple[LayerOutliers, ...]
    groups: dict[str, GroupOutliers] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain lists, dictionaries and numbers, as JSON would give it back."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}


class _Layer:
    """Running sums of one block."""

    def __init__(self, name: str, reduction: Reduction) -> None:
        self.name = name
        self.reduction = reduction
        self.max_inf_norm = -1.0
        self.argmax = (0, 0)
        self.inf_norm_sum = 0.0
        self.num_sequences = 0
        self.kurtosis_sum = 0.0
        self.num_kurtoses = 0
        self.moments: Moments | None = None
        self.attention = AttentionSums()

    def add_hidden(self, hidden: Float[Tensor, "tokens hidden"]) -> None:
        inf_norm, place = finite_inf_norm(hidden, self.name)
        if inf_norm > self.max_inf_norm:
            self.max_inf_norm, self.argmax = inf_norm, divmod(place, hidden.shape[-1])
        self.inf_norm_sum += inf_norm
        self.num_sequences += 1
        if self.reduction == "tensor":
            moments = Moments.of(hidden)
            self.moments = moments if self.moments is None else self.moments.merge(moments)
        else:
            kurtoses = kurtosis(hidden if self.reduction == "token" else hidden.reshape(1, -1))
            self.kurtosis_sum += kurtoses.sum().item()
            self.num_kurtoses += len(kurtoses)

    def add_attention(self, probabilities: Float[Tensor, "heads queries keys"]) -> None:
        self.attention += AttentionSums.of(probabilities)

    @property
    def kurtosis(self) -> float:
        return self.moments.kurtosis if self.moments else self.kurtosis_sum / self.num_kurtoses

    def report(self) -> LayerOutliers:
        value = self.kurtosis
        if math.isnan(value):
            raise SparqError(
                f"the kurtosis of {self.name} is undefined: the elements of one {self.reduction} are equal"
            )
        return LayerOutliers(
            max_inf_norm=self.max_inf_norm,
            mean_inf_norm=self.inf_norm_sum / self.num_sequences,
            kurtosis=value,
            attention_mass=self.attention.mass / self.attention.num_rows,
            first_token_share=self.attention.first_token / self.attention.num_choices,
            argmax_token_position=self.argmax[0],
            argmax_channel=self.argmax[1],
        )


def finite_inf_norm(values: Float[Tensor, "*shape"], name: str) -> tuple[float, int]:
    """Return max |x| and its place in the flattened values.

    Raises:
        SparqError: an element is not finite, as when float16 overflows.
    """
    norm, place = values.abs().flatten().max(dim=0)
    if not torch.isfinite(norm):
        raise SparqError(f"{name} has an element that is {norm.item()}: run the model in float32 or bfloat16")
    return norm.item(), int(place.item())


def measure_outliers(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    reduction: str = "sequence",
    groups: Mapping[str, Bool[Tensor, " vocabulary"]] | None = None,
) -> OutlierReport:
    """Measure the outliers of a model on data, in one pass that keeps no activations.

    Both metrics of SpARQ (appendix F) and of Bondarenko et al. 2023 are over x, the output of a decoder
    block. One is the largest infinity norm, max |x|. The other is the kurtosis, averaged over blocks:

    E[(x - mu)^4] / E[(x - mu)^2]^2

    SpARQ measures "at the sentence level" (figure 3), so by default one kurtosis is that of the
    `length * hidden` elements of one sequence in one block, averaged over sequences, then over blocks. Sums
    are in float64, and there is no epsilon.

    A kurtosis over n elements is n at most, and one massive activation brings it there: that of a sequence
    then says little but how long the sequence is, so compare it on the same data only. That of "token" has
    the hidden size for a bound and does not grow with the length.

    The published code averages the kurtosis over further places too (the linear layers and norms inside a
    block); compare numbers between models measured here, not with published ones.

    Args:
        model: a causal LM of a supported family, converted or not.
        batches: each has `input_ids` and `attention_mask` [batch length], padded on either side.
        reduction: "sequence" as above; "tensor" takes one kurtosis over all elements of a block's outputs in
            the whole data; "token" takes one over the hidden size of each token, averaged over tokens.
        groups: names of groups of tokens, and which ids of the vocabulary belong to each; measured apart too.

    Raises:
        SparqError: no batches, a batch without a mask, an empty sequence, only sequences of one token, an
            activation that is not finite, an unknown reduction or an attention that does not return
            probabilities.
    """
    if reduction not in get_args(Reduction):
        raise unknown("reduction", reduction, get_args(Reduction))
    chosen = cast(Reduction, reduction)
    layers = [_Layer(f"the output of layer {i}", chosen) for i in range(len(decoder_blocks(model)))]
    sums = GroupSums(groups or {}, len(layers))
    final_norms: list[float] = []
    num_sequences = num_tokens = 0
    total = len(batches) if isinstance(batches, Sized) else None
    with progress("outliers", total=total, unit="batch") as bar:
        for batch in batches:
            keep = _real_tokens(batch).to(model.device)
            _observe_batch(model, batch, keep, layers, final_norms, sums)
            num_sequences += len(keep)
            num_tokens += int(keep.sum().item())
            bar.update()
    if num_tokens == num_sequences:  # both 0 if there were no batches
        raise SparqError(
            f"cannot measure outliers on {num_sequences} sequences with {num_tokens} tokens: "
            "give a sequence of 2 or more"
        )
    reports = tuple(layer.report() for layer in layers)
    attention = sum((layer.attention for layer in layers), AttentionSums())
    return OutlierReport(
        max_inf_norm=max(layer.max_inf_norm for layer in reports),
        mean_inf_norm=max(layer.mean_inf_norm for layer in reports),
        mean_kurtosis=sum(layer.kurtosis for layer in reports) / len(reports),
        final_norm_max_inf_norm=max(final_norms, default=None),
        attention_mass=attention.mass / attention.num_rows,
        first_token_share=attention.first_token / attention.num_choices,
        sink_rate=attention.sink / attention.choice_mass if attention.choice_mass > 0 else 0.0,
        attention_entropy=attention.entropy / attention.num_choices,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        reduction=chosen,
        layers=reports,
        groups=sums.report(),
    )


def _observe_batch(
    model: PreTrainedModel,
    batch: Mapping[str, Shaped[Tensor, "batch length"]],
    keep: Bool[Tensor, "batch length"],
    layers: list[_Layer],
    final_norms: list[float],
    groups: GroupSums,
) -> None:
    token_ids = batch["input_ids"].to(keep.device)

    def on_hidden(index: int, hidden: Float[Tensor, "batch length hidden"]) -> None:
        for ids, sequence, real in zip(token_ids, hidden, keep, strict=True):
            layers[index].add_hidden(sequence[real])
            groups.add_hidden(index, ids[real], sequence[real])

    def on_attention(index: int, probabilities: Float[Tensor, "batch heads queries keys"]) -> None:
        for ids, sequence, real in zip(token_ids, probabilities, keep, strict=True):
            own = sequence[:, real][:, :, real]
            layers[index].add_attention(own)
            groups.add_attention(ids[real], own)

    def on_final_norm(hidden: Float[Tensor, "batch length hidden"]) -> None:
        final_norms.append(finite_inf_norm(hidden[keep], "the output of the final norm")[0])

    observe(
        model,
        batch["input_ids"],
        keep,
        on_hidden=on_hidden,
        on_attention=on_attention,
        on_final_norm=on_final_norm,
    )


def _real_tokens(batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch length"]:
    if missing := {"input_ids", "attention_mask"} - set(batch):
        raise SparqError(f"a batch needs input_ids and attention_mask, and has no {' and no '.join(sorted(missing))}")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if ids.shape != mask.shape or ids.ndim != 2:
        raise SparqError(
            f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)} must both be [batch, length]"
        )
    keep = mask.ne(0)
    if not keep.any(dim=1).all():
        raise SparqError(f"sequence {int(keep.any(dim=1).int().argmin())} of a batch has no tokens, only padding")
    return keep
