"""Adapt SmolLM2-135M by LoRA and QLoRA on the same text and measure memory and loss: a row of JSON for each.

python scripts/qlora_table.py TEXT.txt rows.jsonl [NAME ...]

NAME is a base, float, int8, nf4 or nf4-double, with an initialization behind it where it is not kaiming, such as
nf4-double-loftq, or with dora or rslora; all of `NAMES` if none is given. The last quarter of the text is held out.
Rows that the file has already are not measured again.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

from sparq.adaptation import LoraSettings, add_lora, trainable_parameters
from sparq.adaptation.quantized_base import quantize_base
from sparq.adaptation.settings import Base
from sparq.data import Batch
from sparq.models import load_model
from sparq.models.families import named_linears
from sparq.pretrained import resolve_model

BACKBONE = "pretrained:smollm2-135m"
NAMES = (
    "float", "int8", "nf4", "nf4-double", "nf4-double-loftq", "float-pissa", "float-olora", "float-eva", "float-dora",
)  # fmt: skip
UPDATES = int(os.environ.get("UPDATES", "48"))
WARMUP, PEAK = 8, 3e-4
SEQUENCES, CONTEXT = 2, 96
RANK = 64


def base_bytes(base: Base | None) -> tuple[int, int]:
    """Return the memory of the blocks' linear layers and of the whole model, what is not quantized in bfloat16."""
    model = load_model(resolve_model(BACKBONE))
    if base is not None:
        quantize_base(model, base, {})
    names = [name for name, _ in named_linears(model)]
    # A state has quantized weights and their scales; PyTorch shares a tied tensor's storage.
    tensors = {tensor.data_ptr(): (name, tensor) for name, tensor in model.state_dict().items()}
    sizes = {
        name: tensor.numel() * (2 if tensor.is_floating_point() and not _is_scale(name) else tensor.element_size())
        for name, tensor in tensors.values()
    }
    return sum(size for name, size in sizes.items() if name.startswith(tuple(names))), sum(sizes.values())


def _is_scale(name: str) -> bool:
    return name.endswith("SCB") or ".weight." in name


def nll(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the next token, in nats."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def measure(name: str, tokens: Tensor) -> dict[str, object]:
    """Return one row."""
    base = next(base for base in ("nf4-double", "nf4", "int8", "float") if name.startswith(base))
    initialization = name.removeprefix(base).removeprefix("-")
    held_out = tokens[-(len(tokens) // 4) :]
    held_out = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    tokens = tokens[: -(len(tokens) // 4)]
    torch.manual_seed(0)
    variant = {initialization: True} if initialization in ("dora", "rslora") else {}
    settings = LoraSettings(
        rank=RANK, alpha=RANK, base=None if base == "float" else base, **variant,
        initialization="kaiming" if variant else initialization or "kaiming",
    )  # fmt: skip
    linear, whole = base_bytes(settings.base)
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, 1, CONTEXT)
    batches = [Batch(input_ids=ids, labels=ids, lengths=(CONTEXT,), num_targets=CONTEXT - 1) for ids in windows]
    model = add_lora(load_model(resolve_model(BACKBONE)), settings, batches=batches).train()
    parameters = list(trainable_parameters(model).values())
    adam = torch.optim.Adam(parameters, betas=(0.9, 0.98))
    random = torch.Generator().manual_seed(0)
    losses = []
    start = time.perf_counter()
    for update in range(UPDATES):
        starts = torch.randint(len(tokens) - CONTEXT, (SEQUENCES,), generator=random)
        loss = nll(model, torch.stack([tokens[i : i + CONTEXT] for i in starts.tolist()]))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.param_groups[0]["lr"] = PEAK * min(1, (update + 1) / WARMUP)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        valid = sum(nll(model, window[None]).item() for window in held_out) / len(held_out)
    return {
        "name": name, "linear_bytes": linear, "base_bytes": whole, "first_loss": sum(losses[:4]) / 4,
        "last_loss": sum(losses[-16:]) / 16, "valid_loss": valid, "updates": UPDATES,
        "tokens": UPDATES * SEQUENCES * CONTEXT, "seconds": round(time.perf_counter() - start),
    }  # fmt: skip


def main() -> None:
    text, out = (Path(argument) for argument in sys.argv[1:3])
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BACKBONE))
    tokens = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    done = {json.loads(line)["name"] for line in out.read_text().splitlines()} if out.exists() else set()
    for name in sys.argv[3:] or NAMES:
        if name not in done:
            row = measure(name, tokens)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
