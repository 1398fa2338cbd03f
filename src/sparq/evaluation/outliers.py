"""The outliers of a model: norm and kurtosis of its layer outputs, and the sinks of its attention."""

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Literal, cast, get_args, overload

from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from sparq.errors import SparqError, unknown
from sparq.evaluation.activation_sums import ActivationSums, Reduction, finite_inf_norm
from sparq.evaluation.attention_statistics import AttentionSums, sink_tokens
from sparq.evaluation.observation import observe
from sparq.evaluation.outeffhop import OutEffHopOutliers, outeffhop_outliers
from sparq.evaluation.outlier_report import AttentionFigures, LayerOutliers, ModuleOutliers, OutlierReport
from sparq.evaluation.real_tokens import real_tokens
from sparq.evaluation.seen_attention import SeenAttention
from sparq.evaluation.token_groups import GroupSums
from sparq.evaluation.value_norms import ValueNorms
from sparq.models.families import decoder_blocks, family_of
from sparq.progress import progress


@overload
def measure_outliers(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    reduction: str = "sequence",
    groups: Mapping[str, Bool[Tensor, " vocabulary"]] | None = None,
    modules: bool = False,
    compat: None = None,
) -> OutlierReport: ...


@overload
def measure_outliers(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, compat: Literal["outeffhop"]
) -> OutEffHopOutliers: ...


def measure_outliers(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    reduction: str = "sequence",
    groups: Mapping[str, Bool[Tensor, " vocabulary"]] | None = None,
    modules: bool = False,
    compat: str | None = None,
) -> OutlierReport | OutEffHopOutliers:
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

    The published code averages the kurtosis over further places too (linear layers and norms inside a
    block) and has peculiarities; `compat="outeffhop"` computes exactly its figures, which do not compare
    with the others.

    Args:
        model: a causal LM of a supported family, converted or not.
        batches: each has `input_ids` and `attention_mask` [batch length], padded on either side. With
            `compat`, full sequences without padding.
        reduction: "sequence" as above; "tensor" takes one kurtosis over all elements of a block's outputs in
            the whole data; "token" takes one over the hidden size of each token, averaged over tokens.
        groups: names of groups of tokens, and which ids of the vocabulary belong to each; measured apart too.
        modules: measure every linear layer, norm and attention inside the blocks too, which takes a fifth longer.
        compat: "outeffhop" for the recipe of the code of Hu et al. 2024a, see `OutEffHopOutliers`.

    Raises:
        SparqError: no batches, a batch without a mask, an empty sequence, only sequences of one token, an
            activation that is not finite, an unknown reduction or recipe, another option beside a recipe, or an
            attention that cannot be watched.
    """
    if reduction not in get_args(Reduction):
        raise unknown("reduction", reduction, get_args(Reduction))
    if compat is not None:
        if compat != "outeffhop":
            raise unknown("compat", compat, ("outeffhop",))
        if reduction != "sequence" or groups or modules:
            raise SparqError("compat='outeffhop' is a fixed recipe: leave out reduction, groups and modules")
        return outeffhop_outliers(model, batches)
    running = _Running(model, cast(Reduction, reduction), groups or {}, modules)
    total = len(batches) if isinstance(batches, Sized) else None
    with progress("outliers", total=total, unit="batch") as bar:
        for batch in batches:
            running.add(batch)
            bar.update(1)
    return running.report()


class _Running:
    """Sums over the batches so far."""

    def __init__(
        self, model: PreTrainedModel, reduction: Reduction, groups: Mapping[str, Tensor], with_modules: bool
    ) -> None:
        family, indices = family_of(model), range(len(decoder_blocks(model)))
        self.model, self.reduction, self.with_modules = model, reduction, with_modules
        self.hidden = [ActivationSums(f"the output of layer {index}", reduction) for index in indices]
        self.attention = [_AttentionRunning() for _ in indices]
        self.mixed_names = [f"{family.blocks}.{index}.{family.attention}" for index in indices]
        self.modules: dict[str, ActivationSums] = {}
        self.groups = GroupSums(groups, len(indices))
        self.final_norms: list[float] = []
        self.num_sequences = self.num_tokens = 0

    def add(self, batch: Mapping[str, Tensor]) -> None:
        keep = real_tokens(batch).to(self.model.device)
        token_ids = batch["input_ids"].to(keep.device)

        def on_hidden(index: int, hidden: Float[Tensor, "batch length hidden"]) -> None:
            for ids, sequence, real in zip(token_ids, hidden, keep, strict=True):
                self.hidden[index].add(sequence[real])
                self.groups.add_hidden(index, ids[real], sequence[real])

        def on_attention(index: int, seen: SeenAttention) -> None:
            sums, values = self.attention[index], seen.values()
            sums.add_logits(seen.visible_scores().amax(dim=(1, 3))[keep])
            for row, (ids, real) in enumerate(zip(token_ids, keep, strict=True)):
                probabilities = seen.probabilities[row][:, real][:, :, real]
                sums.add(probabilities, values[row][:, real])
                self.groups.add_attention(ids[real], probabilities)
            if self.with_modules:
                on_module(self.mixed_names[index], seen.output.flatten(2))

        def on_module(name: str, output: Float[Tensor, "batch length width"]) -> None:
            sums = self.modules.setdefault(name, ActivationSums(f"the output of {name}", self.reduction))
            for sequence, real in zip(output, keep, strict=True):
                sums.add(sequence[real])

        def on_final_norm(hidden: Float[Tensor, "batch length hidden"]) -> None:
            self.final_norms.append(finite_inf_norm(hidden[keep], "the output of the final norm")[0])

        observe(
            self.model,
            batch["input_ids"],
            keep,
            on_hidden=on_hidden,
            on_attention=on_attention,
            on_module=on_module if self.with_modules else None,
            on_final_norm=on_final_norm,
        )
        self.num_sequences += len(keep)
        self.num_tokens += int(keep.sum())

    def report(self) -> OutlierReport:
        attention = _AttentionRunning.total(self.attention)
        if attention.sums.num_choices == 0:
            raise SparqError(f"cannot measure outliers on {self.num_tokens} tokens: give a sequence of 2 or more")
        layers = tuple(
            LayerOutliers(
                **vars(_module(hidden)),
                **vars(own.figures()),
                argmax_token_position=hidden.argmax[0],
                argmax_channel=hidden.argmax[1],
            )
            for hidden, own in zip(self.hidden, self.attention, strict=True)
        )
        return OutlierReport(
            max_inf_norm=max(layer.max_inf_norm for layer in layers),
            mean_inf_norm=max(layer.mean_inf_norm for layer in layers),
            mean_kurtosis=sum(layer.kurtosis for layer in layers) / len(layers),
            final_norm_max_inf_norm=max(self.final_norms, default=None),
            **vars(attention.figures()),
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            reduction=self.reduction,
            layers=layers,
            groups=self.groups.report(),
            modules={name: _module(sums) for name, sums in sorted(self.modules.items())},
        )


class _AttentionRunning:
    """Running sums of the attention of one layer, or of all of them together."""

    def __init__(self) -> None:
        self.sums, self.values, self.max_logit = AttentionSums(), ValueNorms(), -math.inf

    def add_logits(self, largest: Float[Tensor, " queries"]) -> None:
        self.max_logit = max(self.max_logit, largest.max().item())

    def add(
        self, probabilities: Float[Tensor, "heads queries keys"], values: Float[Tensor, "heads keys head_dim"]
    ) -> None:
        self.sums += AttentionSums.of(probabilities)
        self.values += ValueNorms.of(sink_tokens(probabilities), values)

    @classmethod
    def total(cls, layers: Sequence["_AttentionRunning"]) -> "_AttentionRunning":
        whole = cls()
        whole.sums = sum((layer.sums for layer in layers), AttentionSums())
        whole.values = sum((layer.values for layer in layers), ValueNorms())
        whole.max_logit = max(layer.max_logit for layer in layers)
        return whole

    def figures(self) -> AttentionFigures:
        sums, first = self.sums, self.values.mean_first
        assert first is not None, "a layer that has choices has first tokens"
        return AttentionFigures(
            attention_mass=sums.mass / sums.num_rows,
            first_token_share=sums.first_token / sums.num_choices,
            sink_rate=sums.sink / sums.choice_mass if sums.choice_mass > 0 else 0.0,
            attention_entropy=sums.entropy / sums.num_choices,
            max_logit=self.max_logit,
            first_value_norm=first,
            sink_value_norm=self.values.mean_sinks,
            other_value_norm=self.values.mean_others,
        )


def _module(sums: ActivationSums) -> ModuleOutliers:
    return ModuleOutliers(max_inf_norm=sums.max_inf_norm, mean_inf_norm=sums.mean_inf_norm, kurtosis=sums.kurtosis)
