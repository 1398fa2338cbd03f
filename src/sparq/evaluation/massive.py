"""Where massive activations are: in which sequences, at which tokens and channels, and what writes them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparq.evaluation.observation import observe
from sparq.evaluation.real_tokens import real_tokens
from sparq.models.families import family_of


@dataclass(frozen=True, kw_only=True)
class MassiveActivation:
    """One channel of one token, massive in the output of one block or of several.

    Attributes:
        sequence: which of the data, from 0.
        position: place of the token in it, padding not counted.
        token_id: the token.
        channel: place in the hidden size.
        value: the largest of its values by magnitude.
        blocks: the first and the last block in whose output it is massive, from 0.
        module: the part of that first block that added most to it: the attention's or the MLP's last linear layer.
    """

    sequence: int
    position: int
    token_id: int
    channel: int
    value: float
    blocks: tuple[int, int]
    module: str


@dataclass(frozen=True, kw_only=True)
class MassiveActivations:
    """What `find_massive_activations` found.

    Attributes:
        found: by sequence, position and channel.
        num_sequences: how many sequences were looked at.
    """

    found: tuple[MassiveActivation, ...]
    num_sequences: int

    @property
    def num_with(self) -> int:
        """How many sequences have any."""
        return len({one.sequence for one in self.found})

    @property
    def num_at_first(self) -> int:
        """How many sequences have one at their first token."""
        return len({one.sequence for one in self.found if one.position == 0})

    @property
    def tokens(self) -> Counter[int]:
        """How many of the tokens that carry one each id of the vocabulary is."""
        return Counter(ids for _, _, ids in {(one.sequence, one.position, one.token_id) for one in self.found})

    @property
    def writers(self) -> Counter[tuple[str, int]]:
        """How many were written by each module into each channel."""
        return Counter((one.module, one.channel) for one in self.found)


def find_massive_activations(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    threshold: float = 100.0,
    ratio: float = 1000.0,
) -> MassiveActivations:
    """Find the elements of the blocks' outputs that are massive in the sense of Sun et al. 2024 (arXiv 2402.17762).

        |x| > threshold   and   |x| >= ratio * median |h|

    with h the output of the block for the whole sequence, [length hidden].

    A massive activation stays in the residual stream for many blocks. It is told by its token and channel, and what
    wrote it is looked for in the first block that gives it: the module whose output there is largest by magnitude.
    (Where a norm follows the addition, as in OPT-350m, that is before this norm.)

    Args:
        model: a causal LM of a supported family, converted or not.
        batches: each has `input_ids` and `attention_mask` [batch length], padded on either side.
        threshold: what the magnitude has to exceed.
        ratio: how many medians it has to be.

    Raises:
        SparqError: a batch without a mask, or an empty sequence.
    """
    search = _Search(model, threshold, ratio)
    for batch in batches:
        search.add(batch)
    found = tuple(search.found[key] for key in sorted(search.found))
    return MassiveActivations(found=found, num_sequences=search.num_sequences)


class _Search:
    """What was found in the batches so far, by sequence, position and channel."""

    def __init__(self, model: PreTrainedModel, threshold: float, ratio: float) -> None:
        self.model, self.threshold, self.ratio = model, threshold, ratio
        family = family_of(model)
        self.writers = (family.output, family.down)
        self.found: dict[tuple[int, int, int], MassiveActivation] = {}
        self.num_sequences = 0

    def add(self, batch: Mapping[str, Tensor]) -> None:
        keep = real_tokens(batch).to(self.model.device)
        sequences = [ids[real].tolist() for ids, real in zip(batch["input_ids"].to(keep.device), keep, strict=True)]
        written: dict[str, Tensor] = {}

        def on_module(name: str, output: Float[Tensor, "batch length width"]) -> None:
            if name.endswith(self.writers):
                written[name] = output

        def on_hidden(index: int, hidden: Float[Tensor, "batch length hidden"]) -> None:
            for row, (ids, real) in enumerate(zip(sequences, keep, strict=True)):
                parts = {name: output[row, real] for name, output in written.items()}
                self._see(index, self.num_sequences + row, ids, hidden[row, real], parts)
            written.clear()

        observe(self.model, batch["input_ids"], keep, on_hidden=on_hidden, on_module=on_module)
        self.num_sequences += len(sequences)

    def _see(
        self,
        block: int,
        sequence: int,
        ids: Sequence[int],
        hidden: Float[Tensor, "length hidden"],
        written: Mapping[str, Float[Tensor, "length hidden"]],
    ) -> None:
        magnitudes = hidden.float().abs()
        massive = (magnitudes > self.threshold) & (magnitudes >= self.ratio * magnitudes.median())
        for position, channel in massive.nonzero().tolist():
            value = float(hidden[position, channel])
            known = self.found.get((sequence, position, channel))
            if known is None:
                known = MassiveActivation(
                    sequence=sequence, position=position, token_id=ids[position], channel=channel, value=value,
                    blocks=(block, block), module=max(written, key=lambda name: written[name][position, channel].abs()),
                )  # fmt: skip
            self.found[sequence, position, channel] = replace(
                known, value=max(value, known.value, key=abs), blocks=(known.blocks[0], block)
            )
