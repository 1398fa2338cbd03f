"""What 4-bit inputs of one kind of layer alone do to SpeechLMs, and how far the largest channel stands out in them.

python scripts/four_bit_inputs.py RUN/manifest.tsv RUN/models/NAME ...   # a minute a model

Rounding is to nearest, symmetric, one scale a token; weights are as they are. The sequences are text and speech alone,
of the first 10 utterances of the test splits. The models share vocabulary and units.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparq.adaptation import load_speechlm
from sparq.audio import read_manifest
from sparq.models.families import decoder_blocks, input_groups
from sparq.quantization.quantizer import fake_quantize
from sparq.recipes.apply import encode_recordings
from sparq.recipes.outlier_sequences import task_sequences

UTTERANCES = 10


def main(manifest: Path, folders: list[str]) -> None:
    tests = [each for each in read_manifest(manifest) if each.split.startswith("test")][:UTTERANCES]
    sequences: dict[str, list[Tensor]] = {}
    for folder in folders:
        speechlm = load_speechlm(Path(folder))
        if not sequences:
            units = encode_recordings(speechlm, [each.path for each in tests])
            spoken = list(zip((each.text for each in tests), units, strict=True))
            tasks = ("textlm", "speechlm")
            sequences = {task: task_sequences(speechlm.vocabulary, task, spoken) for task in tasks}
        print(f"{folder}: in full precision {losses(speechlm.model, sequences)}", flush=True)
        blocks = decoder_blocks(speechlm.model)
        for names in input_groups(speechlm.model):
            layers = [block.get_submodule(name) for block in blocks for name in names]
            inputs: list[list[Tensor]] = [[] for _ in layers]
            watchers = [keeper(kept) for kept in inputs]
            hooks = [layer.register_forward_pre_hook(see) for layer, see in zip(layers, watchers, strict=True)]
            losses(speechlm.model, sequences)
            for hook in hooks:
                hook.remove()
            ratio, common = zip(*(outstanding(torch.cat(kept)) for kept in inputs), strict=True)
            hooks = [layer.register_forward_pre_hook(rounded) for layer in layers]
            low = losses(speechlm.model, sequences)
            for hook in hooks:
                hook.remove()
            mean, share = sum(ratio) / len(layers), 100 * sum(common) / len(layers)
            kind = ", ".join(name.rpartition(".")[2] for name in names)
            print(f"  {kind}: {low}; largest by rms {mean:.1f}, the same channel for {share:.0f} %", flush=True)


def keeper(kept: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that keeps every token's input."""
    return lambda _, args: kept.append(args[0].flatten(0, -2).float())


def outstanding(inputs: Tensor) -> tuple[float, float]:
    """Return a token's largest channel by its root mean square, on average, and how often it is the commonest one."""
    sizes = inputs.abs()
    ratio = sizes.amax(-1) / inputs.square().mean(-1).sqrt()
    largest = sizes.argmax(-1)
    return float(ratio.mean()), float((largest == largest.mode().values).float().mean())


def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (fake_quantize(args[0], 4, symmetric=True), *args[1:])


@torch.no_grad()
def losses(model: Any, sequences: dict[str, list[Tensor]]) -> str:
    """Return the mean loss of a token, in nats, by task."""
    found = []
    for task, of_task in sequences.items():
        logits = [model(ids[None]).logits[0, :-1].float() for ids in of_task]
        loss = functional.cross_entropy(torch.cat(logits), torch.cat([ids[1:] for ids in of_task]))
        found.append(f"{task} {loss:.2f}")
    return ", ".join(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
