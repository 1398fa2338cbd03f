"""SpARQ proposition C.1's norms, measured in a model: what has to stay small for LoRA's gradients to be fast.

The proposition says that no algorithm computes LoRA's gradients approximately in less than quadratic time in the length
L once max |X W_K| and max |(alpha / r) X B_Q A_Q| may reach Gamma, which grows faster than sqrt(log L). Below that a
sub-quadratic one can exist. It is a statement on growth with L, so a single number decides nothing; what can be
measured is how far a model is from sqrt(log L), layer by layer, and whether one attention brings it nearer than
another.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.evaluation.observation import evaluating
from sparq.files import read_json
from sparq.models.families import attention_layers, decoder_blocks, family_of
from sparq.recipes.subject import Data, is_speechlm, load_subject

QueryUpdate = Float[Tensor, "queries hidden"]
"""The change (alpha / r) B A of a layer's query weights."""


@dataclass(frozen=True, kw_only=True)
class LayerNorms:
    """The norms of one layer, over all tokens of all sequences.

    Attributes:
        layer: its index, from 0.
        key_norm: max |X W_K|, before biases, norms and rotations, where X is what the layer's projections read.
        query_update_norm: max |(alpha / r) X B_Q A_Q|; None without adapters on the queries.
        key_ratio: the largest max |X W_K| / sqrt(log L) of any sequence, L being its own length.
        query_update_ratio: the same of the update.
    """

    layer: int
    key_norm: float
    query_update_norm: float | None
    key_ratio: float
    query_update_ratio: float | None


def measure_norm_condition(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    updates: Sequence[QueryUpdate] | None = None,
) -> tuple[LayerNorms, ...]:
    """Return the norms of proposition C.1 in every layer.

    Args:
        model: a causal LM, adapters merged; its key weights are W_K as it uses them.
        batches: `input_ids` and, where there is padding, `attention_mask`; sequences of 2 tokens or more.
        updates: what the adapters change the query weights by, of each layer; see `query_updates`.

    Raises:
        SparqError: the family makes queries, keys and values in one layer, or there are no sequences.
    """
    family = family_of(model)
    if family.fused:
        raise SparqError(f"{family.model_type} makes queries, keys and values in one layer: its keys are not apart")
    layers = attention_layers(model)
    assert updates is None or len(updates) == len(layers), "one update a layer"
    keys = [_Largest() for _ in layers]
    queries = [_Largest() for _ in layers]
    mask = torch.zeros(0)

    def hook(index: int, projection: nn.Linear) -> None:
        def look(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].reshape(*mask.shape, -1).float()
            keys[index].see(x @ projection.weight.float().T, mask)
            if updates is not None:
                queries[index].see(x @ updates[index].float().T, mask)

        handles.append(projection.register_forward_pre_hook(look))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for index, layer in enumerate(layers):
            hook(index, layer.get_submodule("k_proj"))  # type: ignore[arg-type]
        with evaluating(model), torch.no_grad():
            for batch in batches:
                ids = batch["input_ids"].to(model.device)
                mask = batch.get("attention_mask", torch.ones_like(ids)).to(model.device).bool()
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not keys[0].norm:
        raise SparqError("no sequences to measure norms on")
    return tuple(
        LayerNorms(
            layer=index,
            key_norm=key.norm,
            query_update_norm=None if updates is None else query.norm,
            key_ratio=key.ratio,
            query_update_ratio=None if updates is None else query.ratio,
        )
        for index, (key, query) in enumerate(zip(keys, queries, strict=True))
    )


def query_updates(folder: Path, model: PreTrainedModel) -> list[Tensor] | None:
    """Return (alpha / r) B A of every layer's queries from a trained SpeechLM's folder, None after full fine-tuning.

    Raises:
        SparqError: the adapters have no such product: DoRA scales it row by row, and there may be none on the queries.
    """
    if not (folder / "adapter").is_dir():
        return None
    config = read_json(folder / "adapter" / "adapter_config.json")
    if config["use_dora"]:
        raise SparqError(
            f"{folder} was adapted with DoRA, which is more than (alpha / r) B A: its update is not measured"
        )
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    family = family_of(model)
    found = []
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
        for index in range(len(decoder_blocks(model))):
            stem = f"base_model.model.{family.blocks}.{index}.{family.attention}.q_proj"
            if f"{stem}.lora_A.weight" not in names:
                raise SparqError(
                    f"{folder} has no adapter on the queries of layer {index}: there is no update to measure"
                )
            down, up = (tensors.get_tensor(f"{stem}.lora_{name}.weight").float() for name in "AB")
            found.append(scale * up @ down)
    return found


def norms_of(
    reference: str, *, attention: str | None = None, text: Path | None = None, tokens: int = 2048, context: int = 512
) -> tuple[LayerNorms, ...]:
    """Return the norms of a causal LM on text, or of a trained SpeechLM on training sequences of its run's four tasks.

    Args:
        reference: a folder, a hub name or `pretrained:NAME`; or RUN/models/FRAMEWORK.
        attention: the attention to run a causal LM with; that of its config by default.
        text: a text for causal LMs; the demo's page of prose by default.
        tokens: how many to measure on.
        context: most tokens of a sequence of text.
    """
    speechlm = is_speechlm(reference)
    with as_file(files("sparq") / "demo" / "prose.txt") as prose:
        calibration = text if speechlm or text else prose
        data = Data(calibration=calibration, tokens=tokens, context=context)
        subject = load_subject(reference, data, calibrates=True, attention=attention)
    updates = query_updates(Path(reference), subject.model) if speechlm else None
    return measure_norm_condition(subject.model, subject.calibration, updates)


class _Largest:
    """The largest magnitude seen, and the largest by its sequence's sqrt(log L)."""

    def __init__(self) -> None:
        self.norm = self.ratio = 0.0

    def see(self, values: Float[Tensor, "batch length width"], mask: Tensor) -> None:
        largest = values.abs().amax(-1).masked_fill(~mask, 0.0).amax(-1)  # batch
        lengths = mask.sum(-1)
        if int(lengths.min()) < 2:
            raise SparqError("a sequence has fewer than 2 tokens: sqrt(log L) is 0 there")
        self.norm = max(self.norm, float(largest.max()))
        self.ratio = max(self.ratio, float((largest / lengths.float().log().sqrt()).max()))
