"""Scales, and matrices of low rank, trained until the quantized model predicts what the float model did.

All blocks together, Adam minimizes over the calibration tokens the mean of

    KL(p || p_q) = sum over the vocabulary of p (log p - log p_q)

where p are the float model's probabilities of the next token and p_q those of the quantized model. The target is the
float model alone (LLM-QAT: Liu et al. 2023, arXiv 2305.17888, section 2.2). Batches may have labels; they only say
which tokens count. A model that was trained on some tokens of its sequences, as a SpeechLM is on what follows a prompt,
says nothing of use about the others. Then each sequence counts alike, so that long answers do not outweigh short ones.

What is trained are the scales of the weights' rows or groups, each by a factor that starts at 1; the integers stay
(EfficientQAT: Chen et al. 2024, arXiv 2407.11062, section 3.3, has the scales trained last and alone). With `low_rank`
every layer gets B A x beside its integers, as LoRA has it (Hu et al. 2021, arXiv 2106.09685), in floating point and
trained against the quantized layers; B starts at 0. The rounding of the layers' inputs has the gradient of the identity
(Bengio et al. 2013, arXiv 1308.3432).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from sparq.bfloat16 import fast_products
from sparq.data import IGNORE
from sparq.errors import SparqError
from sparq.models.families import named_linears
from sparq.progress import progress
from sparq.quantization.grid import Grid
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.observers import CalibrationBatch, checked_batch
from sparq.quantization.quantizer import split_groups
from sparq.quantization.resume import BlockStore
from sparq.quantization.scheme import QuantizationScheme

_CHUNK = 512
"""Tokens whose logits are in memory at once."""

_KEPT_EVERY = 10
"""Steps after which the state is kept, where it is."""

_WARMUP = 10
"""Steps over which the rate rises."""


@dataclass(frozen=True)
class Example:
    """A batch with what the float model makes of it.

    Attributes:
        ids: token ids.
        mask: 1 where there is a token, 0 for padding.
        share: of the position in the loss; 0 where what is predicted does not count, 1 in all.
        target: the float model's last hidden states, which the head reads, where `share` is not 0.
    """

    ids: Int[Tensor, "batch length"]
    mask: Int[Tensor, "batch length"]
    share: Float[Tensor, "batch length"]
    target: Float[Tensor, "tokens hidden"]


@torch.no_grad()
def float_examples(model: PreTrainedModel, batches: Iterable[CalibrationBatch]) -> list[Example]:
    """Return the targets of `distill`; they take as much memory as one layer's hidden states of all tokens.

    Args:
        model: the model before its layers are quantized, in evaluation mode, rotated already: head and last hidden
            states are then of one basis.
        batches: calibration data, read once; batches in which nothing counts are left out.

    Raises:
        SparqError: there are no tokens, or none that counts; a batch is not of this model; or the model's output is NaN
            or infinite.
    """
    examples = []
    tokens = 0
    for index, batch in enumerate(batches):
        ids, mask = checked_batch(model, batch, index)
        share = _shares(batch, mask, index)
        tokens += int(mask.sum())
        if share.any():
            target = _last_hidden(model, ids, mask)[share > 0]
            if not target.isfinite().all():
                raise SparqError(f"the model's output is NaN or infinite on calibration batch {index}; check the model")
            examples.append(Example(ids, mask, share, target))
    if tokens and not examples:
        raise SparqError("none of the calibration data's tokens counts: all labels are -100")
    if not examples:
        raise SparqError("the calibration data has no tokens; give at least one batch, 100,000 tokens are advised")
    return examples


def _shares(batch: CalibrationBatch, mask: Int[Tensor, "batch length"], index: int) -> Float[Tensor, "batch length"]:
    """Return the share in the loss of what each position predicts."""
    counts = mask.float()
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is not None:
        if labels.shape != mask.shape:
            found, expected = list(labels.shape), list(mask.shape)
            raise SparqError(f"calibration batch {index} has labels of shape {found} for ids of shape {expected}")
        asked = (labels.to(mask.device) != IGNORE) & mask.bool()
        counts = functional.pad(asked[:, 1:].float(), (0, 1))  # a position predicts the next
        counts /= counts.sum(1, keepdim=True).clamp(min=1)
    return counts / counts.sum().clamp(min=1)


@torch.enable_grad()
def distill(
    model: PreTrainedModel, scheme: QuantizationScheme, examples: list[Example], store: BlockStore | None = None
) -> None:
    """Train the weights' scales of a model's `QuantizedLinear` layers, and what is beside them, in place.

    A batch is a step. The bar shows a running mean of the divergence, in nats a token.

    Args:
        model: the linear layers of its blocks have integer weights; nothing else is trained.
        scheme: passes over the data, rates, rank, and the seed of the order of batches and of A.
        examples: what `float_examples` made of the same model.
        store: where the state of the training is kept every so many steps, and gone on from.

    Raises:
        SparqError: the divergence is NaN or infinite.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(scheme.seed)
    trained = {name: _TrainedLinear(layer, scheme.low_rank, generator) for name, layer in list(named_linears(model))}
    for name, layer in trained.items():
        model.set_submodule(name, layer)
    parts = {
        "gain": [layer.gain for layer in trained.values()],
        "a": [layer.a for layer in trained.values() if layer.a is not None],
        "b": [layer.b for layer in trained.values() if layer.b is not None],
    }
    rates = {"gain": scheme.scale_rate, "a": scheme.low_rank_rate, "b": scheme.low_rank_rate}
    groups = [{"params": parameters, "peak": rates[part]} for part, parameters in parts.items() if parameters]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    order = [i for _ in range(scheme.epochs) for i in torch.randperm(len(examples), generator=generator).tolist()]
    done = 0 if store is None else _go_on(optimizer, parts, store)
    rank = "" if scheme.low_rank is None else f", or low_rank_rate {scheme.low_rank_rate:g}"
    mean = None
    with progress(f"train {scheme.name}", total=len(order), unit="step", initial=done) as bar:
        for step in range(done, len(order)):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _rate(step, len(order))
            example = examples[order[step]]
            with fast_products(example.ids.device, torch.bfloat16, model):
                loss = _backward(model, example)
            if not math.isfinite(loss):
                raise SparqError(f"training {scheme.name} diverged: scale_rate {scheme.scale_rate:g} is too high{rank}")
            optimizer.step()
            optimizer.zero_grad()
            mean = loss if mean is None else 0.9 * mean + 0.1 * loss
            bar.set_postfix(divergence=f"{mean:.3g}")
            bar.update()
            if store is not None and ((step + 1) % _KEPT_EVERY == 0 or step + 1 == len(order)):
                store.save_training(_state(optimizer, parts))
    for name, layer in trained.items():
        model.set_submodule(name, layer.finished(scheme.for_layer(name).weight_bits))


class _TrainedLinear(nn.Module):
    """A `QuantizedLinear` with trained parts.

    Attributes:
        gain: [outputs, groups], multiplies the weights' scales; from 1.
        a: [rank, inputs], or None without a rank; random.
        b: [outputs, rank]; from 0.
    """

    a: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(self, layer: nn.Module, rank: int | None, generator: torch.Generator) -> None:
        super().__init__()
        assert isinstance(layer, QuantizedLinear)
        assert layer.weight_scale is not None, "integer weights have scales"
        self._layer = (layer,)  # not a submodule: its tensors are not trained
        self.gain = nn.Parameter(torch.ones_like(layer.weight_scale))
        self.a = self.b = None
        if rank is not None:
            # PEFT's start: uniform, of variance 1 / (3 inputs).
            start = torch.rand(rank, layer.in_features, generator=generator) * 2 - 1
            self.a = nn.Parameter(start.to(layer.weight_scale.device) / math.sqrt(layer.in_features))
            self.b = nn.Parameter(self.a.new_zeros(layer.out_features, rank))

    def forward(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        """Return the layer's output in the type of `x`."""
        layer = self._layer[0]
        seen, weight = layer.seen(x).float(), layer.dense_weight()
        groups = self.gain.shape[1]
        if groups > 1:
            grouped = split_groups(weight, groups) * self.gain[..., None]
            output = functional.linear(seen, grouped.view(weight.shape))
        else:
            # With one scale a row the gain is one of the output, and no gradient of a whole weight matrix is needed.
            output = functional.linear(seen, weight) * self.gain[:, 0]
        if self.a is not None and self.b is not None:
            output = output + functional.linear(functional.linear(x.float(), self.a), self.b)
        return (output if layer.bias is None else output + layer.bias).to(x.dtype)

    @torch.no_grad()
    def finished(self, bits: int) -> QuantizedLinear:
        """Return the layer with what was trained."""
        layer = self._layer[0]
        assert layer.weight_scale is not None, "integer weights have scales"
        grid = Grid(scale=layer.weight_scale * self.gain, zero_point=layer.weight_zero_point, bits=bits)
        low_rank = None if self.a is None or self.b is None else (self.a.detach(), self.b.detach())
        return layer.rounded(grid, layer.weight, low_rank)


_Parts = Mapping[str, list[nn.Parameter]]
"""What is trained, by its name in a layer, in the order of layers."""


def _state(optimizer: torch.optim.Adam, parts: _Parts) -> dict[str, Tensor]:
    """Return what is trained and what Adam knows of it, numbered in the order of layers."""
    state: dict[str, Tensor] = {}
    for part, parameters in parts.items():
        for number, parameter in enumerate(parameters):
            known = {"value": parameter.detach(), **optimizer.state[parameter]}
            state |= {f"{number}.{part}.{name}": tensor for name, tensor in known.items()}
    return state


@torch.no_grad()
def _go_on(optimizer: torch.optim.Adam, parts: _Parts, store: BlockStore) -> int:
    """Take over the state of an interrupted training, if there is one, and return how many steps it has made."""
    state = store.load_training()
    if state is None:
        return 0
    for part, parameters in parts.items():
        for number, parameter in enumerate(parameters):
            known = {name: state[f"{number}.{part}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq", "value")}
            parameter.copy_(known.pop("value"))
            optimizer.state[parameter] = known
    return int(state["0.gain.step"])


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak rate: a linear rise, and half a cosine down to 5 %."""
    return min(1.0, (step + 1) / _WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


def _last_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Float[Tensor, "batch length hidden"]:
    result = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    states: Tensor = result.last_hidden_state
    return states


def _backward(model: PreTrainedModel, example: Example) -> float:
    """Add the gradient of the mean divergence to the parameters' and return its value.

    The logits of all tokens do not exist at once: the gradient of the last hidden states is gathered first. That of the
    logits is p_q - p, times the token's share.
    """
    with torch.autocast(example.ids.device.type, torch.bfloat16):
        states = _last_hidden(model, example.ids, example.mask)[example.share > 0]
    shares = example.share[example.share > 0]
    gradients: list[Tensor] = []
    total = 0.0
    head = model.get_output_embeddings()
    for start in range(0, len(states), _CHUNK):
        seen = states[start : start + _CHUNK].detach().requires_grad_()
        target, weight = example.target[start : start + _CHUNK], shares[start : start + _CHUNK, None]
        with torch.autocast(example.ids.device.type, torch.bfloat16):
            logits = head(seen)
            with torch.no_grad():
                wanted = head(target).float().log_softmax(-1)
        with torch.no_grad():
            got = logits.float().log_softmax(-1)
            wanted_share = wanted.exp()
            total += float((wanted.sub_(got).mul_(wanted_share).mul_(weight)).sum())
            gradient = got.exp_().sub_(wanted_share).mul_(weight)
        gradients += torch.autograd.grad(logits, seen, gradient.to(logits.dtype))
    torch.autograd.backward(states, torch.cat(gradients))
    return total
