"""OmniQuant and AffineQuant written down plainly for OPT's blocks, apart from the package; it made the golden losses.

python tests/learned_reference.py writes golden/learned_losses.json. Everything is spelled out here: the block, rounding
with a straight-through estimator, clipping (sigmoid of a number a row, from 4), changes (scale, shift, or a matrix
within a growing band), SmoothQuant's start, AdamW at the authors' rates, x from quantized blocks and targets from float
ones.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from model_families import tiny_model

GOLDEN = Path(__file__).parent / "golden" / "learned_losses.json"
CASES = {
    "omniquant-w4a4": {"affine": False, "weight_bits": 4, "activation_bits": 4},
    "omniquant-w3a16": {"affine": False, "weight_bits": 3, "activation_bits": 16},
    "affinequant-w4a4": {"affine": True, "weight_bits": 4, "activation_bits": 4},
    "affinequant-w3a16": {"affine": True, "weight_bits": 3, "activation_bits": 16},
}
EPOCHS, RATE, CLIPPING_RATE, ALPHA, STABILITY = 4, 5e-3, 1e-2, 0.5, 0.01


def opt() -> PreTrainedModel:
    """The tiny OPT with norms and biases as a trained model has them.

    Without biases a sum of small integers is often exactly 0, and float32 decides on which side of it a ReLU is.
    """
    model = tiny_model("opt")
    generator = torch.Generator().manual_seed(12)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "layer_norm" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def batches() -> list[Tensor]:
    """Tokens for which losses after training are the same to 1e-5 when the embeddings are scaled by 1 + 1e-6.

    With most seeds one rounding falls to the other side then, training takes another course, and the losses of 4-bit
    activations move by percents: so they do between two processors' orders of summation.
    """
    generator = torch.Generator().manual_seed(13)
    return [torch.randint(3, 96, (2, 12), generator=generator) for _ in range(3)]


def through(x: Tensor) -> Tensor:
    """Round; the gradient is that of x. In this order it is the integer exactly, and no clamp cuts its gradient off."""
    return x.detach().round() + (x - x.detach())


def fake(x: Tensor, bits: int, low: Any = 1.0, high: Any = 1.0) -> Tensor:
    """Asymmetric, one scale a row of the last dimension; rounding passes gradients on."""
    if bits == 16:
        return x
    bottom = x.min(-1, keepdim=True).values.clamp(max=0) * low
    top = x.max(-1, keepdim=True).values.clamp(min=0) * high
    step = (top - bottom) / (2**bits - 1)
    zero, level = -through(bottom / step), through(x / step)
    return ((level + zero).clamp(0, 2**bits - 1) - zero) * step


class Place:
    """A change between what makes a vector and its readers: A = (I + mix in a band) diag(scale), and a shift."""

    def __init__(self, scale: Tensor, shift: Tensor | None, heads: int, *, whole: bool) -> None:
        self.log_scale = scale.log().requires_grad_()
        self.shift = None if shift is None else shift.clone().requires_grad_()
        size = len(scale) // heads
        self.mix = torch.zeros(heads, size, size).requires_grad_() if whole else None
        self.heads, self.size, self.band = heads, size, 0.0

    def parameters(self) -> list[Tensor]:
        return [p for p in (self.log_scale, self.shift, self.mix) if p is not None]

    def matrix(self) -> Tensor:
        """A as one matrix of all heads."""
        scales = self.log_scale.exp()
        if self.mix is None:
            return torch.diag(scales)
        blocks = []
        for head in range(self.heads):
            own = scales[head * self.size : (head + 1) * self.size]
            rows = torch.arange(self.size)
            far = (rows[:, None] - rows[None]).abs()
            let_in = (far > 0) & (far <= self.band * self.size)
            blocks.append(torch.diag(own) + torch.where(let_in, STABILITY * self.mix[head] * own[None], 0.0))
        return torch.block_diag(*blocks)


class Block:
    """One OPT block (norms ahead), float or with everything learned."""

    def __init__(self, layer: Any, heads: int) -> None:
        self.w = {name: p.detach().clone() for name, p in layer.named_parameters()}
        self.heads = heads
        self.names = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")] + ["fc1", "fc2"]

    def float(self, x: Tensor, seen: dict[str, Tensor] | None = None) -> Tensor:
        weights = {n: (self.w[f"{n}.weight"], self.w[f"{n}.bias"]) for n in self.names}
        norms = {n: (self.w[f"{n}.weight"], self.w[f"{n}.bias"]) for n in ("self_attn_layer_norm", "final_layer_norm")}
        return self.run(x, weights, norms, 16, {} if seen is None else seen, {})

    def run(
        self, x: Tensor, weights: Any, norms: Any, bits: int, seen: dict[str, Tensor], inverse: dict[str, Tensor]
    ) -> Tensor:
        def linear(name: str, value: Tensor) -> Tensor:
            seen[name] = value
            if name in inverse:
                value = value @ inverse[name]
            return fake(value, bits) @ weights[name][0].T + weights[name][1]

        def split(value: Tensor) -> Tensor:
            return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        h = functional.layer_norm(x, (x.shape[-1],), *norms["self_attn_layer_norm"])
        q, k, v = (split(linear(f"self_attn.{n}_proj", h)) for n in ("q", "k", "v"))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        o = logits.masked_fill(later, -math.inf).softmax(-1) @ v
        x = x + linear("self_attn.out_proj", o.transpose(1, 2).flatten(-2))
        h = functional.layer_norm(x, (x.shape[-1],), *norms["final_layer_norm"])
        return x + linear("fc2", linear("fc1", h).relu())


def learn(
    block: Block, xs: list[Tensor], floats: list[Tensor], case: dict[str, Any]
) -> tuple[float, float, list[Tensor]]:
    """Train one block; return its loss before and after, and what the quantized block then puts out."""
    wbits, abits, affine = case["weight_bits"], case["activation_bits"], case["affine"]
    seen: list[dict[str, Tensor]] = []
    targets = []
    for x in floats:
        seen.append({})
        targets.append(block.float(x, seen[-1]))
    spots = {
        "norm1": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 1, affine and abits == 16),
        "value": (["self_attn.out_proj"], block.heads, affine),
        "norm2": (["fc1"], 1, affine and abits == 16),
    }
    places = {}
    for spot, (readers, heads, whole) in spots.items():
        inputs = torch.cat([s[readers[0]].flatten(0, -2) for s in seen])
        low, high = inputs.min(0).values, inputs.max(0).values
        shift = torch.zeros_like(low) if affine else (low + high) / 2
        reach = torch.maximum(high - shift, shift - low)
        heaviest = (
            torch.stack([block.w[f"{n}.weight"].abs().max(0).values for n in readers]).max(0).values.clamp(min=1e-5)
        )
        scale = (reach**ALPHA / heaviest ** (1 - ALPHA)).clamp(min=1e-5)
        places[spot] = Place(scale, None if affine else shift, heads, whole=whole)
    clips = {n: [torch.full((len(block.w[f"{n}.weight"]), 1), 4.0).requires_grad_() for _ in "lh"] for n in block.names}

    def out(x: Tensor) -> Tensor:
        weights = {n: [block.w[f"{n}.weight"], block.w[f"{n}.bias"]] for n in block.names}
        norms, inverse = {}, {}
        for spot, norm in (("norm1", "self_attn_layer_norm"), ("norm2", "final_layer_norm"), ("value", "")):
            place, readers = places[spot], spots[spot][0]
            matrix = place.matrix()
            for name in readers:
                if place.shift is not None:
                    weights[name][1] = weights[name][1] + weights[name][0] @ place.shift
                weights[name][0] = weights[name][0] @ matrix.T
            if spot == "value":  # y = x W^T + b becomes (y - d) A^-1
                back = torch.linalg.inv(matrix.double()).float()
                value, offset = weights["self_attn.v_proj"]
                offset = offset if place.shift is None else offset - place.shift
                weights["self_attn.v_proj"] = [back.T @ value, offset @ back]
            else:
                gain, offset = block.w[f"{norm}.weight"], block.w[f"{norm}.bias"]
                if place.mix is not None:
                    inverse.update(dict.fromkeys(readers, torch.linalg.inv(matrix.double()).float()))
                else:
                    offset = offset if place.shift is None else offset - place.shift
                    gain, offset = gain / matrix.diagonal(), offset / matrix.diagonal()
                norms[norm] = (gain, offset)
        rounded = {
            n: (fake(w, wbits, clips[n][0].sigmoid(), clips[n][1].sigmoid()), b) for n, (w, b) in weights.items()
        }
        return block.run(x, rounded, norms, abits, {}, inverse)

    def total() -> float:
        with torch.no_grad():
            return sum(float((out(x) - t).square().mean()) for x, t in zip(xs, targets, strict=True)) / len(xs)

    changed = [p for place in places.values() for p in place.parameters()]
    clipped = [p for pair in clips.values() for p in pair]
    optimizer = torch.optim.AdamW(
        [{"params": changed, "lr": RATE}, {"params": clipped, "lr": CLIPPING_RATE}], weight_decay=0.0
    )
    before = least = total()
    best, band = [p.detach().clone() for p in (*changed, *clipped)], 0.0
    for epoch in range(EPOCHS):
        for place in places.values():
            place.band = (epoch + 1) / EPOCHS
        for x, target in zip(xs, targets, strict=True):
            optimizer.zero_grad()
            (out(x) - target).square().mean().backward()
            optimizer.step()
        now = total()
        if now < least:
            least, band = now, (epoch + 1) / EPOCHS
            best = [p.detach().clone() for p in (*changed, *clipped)]
    with torch.no_grad():
        for parameter, kept in zip((*changed, *clipped), best, strict=True):
            parameter.copy_(kept)
        for place in places.values():
            place.band = band
        return before, least, [out(x) for x in xs]


def losses(case: dict[str, Any]) -> list[list[float]]:
    """Return the loss of each block of the tiny OPT before and after training."""
    model = opt()
    decoder = model.model.decoder
    with torch.no_grad():
        floats = []
        for ids in batches():
            positions = decoder.embed_positions(torch.ones_like(ids), 0)
            floats.append(decoder.embed_tokens(ids) + positions)
    xs, found = floats, []
    for layer in decoder.layers:
        block = Block(layer, model.config.num_attention_heads)
        before, after, xs = learn(block, xs, floats, case)
        found.append([before, after])
        floats = [block.float(x) for x in floats]
    return found


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(case) for name, case in CASES.items()}, indent=2) + "\n")
