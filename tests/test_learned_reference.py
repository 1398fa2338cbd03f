"""Losses of OmniQuant's and AffineQuant's blocks against a plain reference, and against what it gave once."""

import json

import pytest
import torch
from torch import Tensor

import learned_reference as reference
from sparq.quantization import learned, quantize

GOLDEN = json.loads(reference.GOLDEN.read_text())


def losses(name: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Each block's loss before and after training, by the package."""
    found: list[tuple[float, float]] = []
    train = learned._train

    def kept(*arguments: object) -> tuple[float, float]:
        found.append(train(*arguments))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(learned, "_train", kept)
    case = dict(reference.CASES[name])
    method = "affinequant" if case.pop("affine") else "omniquant"
    quantize(reference.opt(), reference.batches(), method=method, epochs=reference.EPOCHS, **case)
    return torch.tensor(found)


@pytest.mark.parametrize("name", reference.CASES)
def test_losses_are_those_of_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, golden = losses(name, monkeypatch), torch.tensor(GOLDEN[name])
    torch.testing.assert_close(ours, golden, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(reference.losses(reference.CASES[name])), golden, rtol=1e-4, atol=0)
