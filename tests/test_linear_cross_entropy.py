"""Head and loss in chunks against PyTorch's own on whole logits."""

import pytest
import torch
from torch.nn import functional

from sparq.training.linear_cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("chunk_bytes", [1, 11 * 4 * 3, 1 << 20])
def test_equals_whole_logits(smoothing: float, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time, three, all."""
    monkeypatch.setattr("sparq.training.linear_cross_entropy._CHUNK_BYTES", chunk_bytes)
    hidden = torch.randn(13, 6, requires_grad=True)
    weight = torch.randn(11, 6, requires_grad=True)
    expected = torch.randint(0, 11, (13,))
    objective, nll, correct = linear_cross_entropy(hidden, weight, expected, smoothing=smoothing)
    logits = hidden @ weight.T
    theirs = functional.cross_entropy(logits, expected, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(objective, theirs)
    torch.testing.assert_close(nll, functional.cross_entropy(logits, expected, reduction="sum").detach())
    assert correct == (logits.argmax(dim=-1) == expected).sum()
    for ours, other in zip(
        torch.autograd.grad(3 * objective, (hidden, weight)), torch.autograd.grad(3 * theirs, (hidden, weight)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "none"])
def test_only_wanted_gradients_are_computed(wanted: str) -> None:
    hidden = torch.randn(5, 6, requires_grad=wanted == "hidden")
    weight = torch.randn(11, 6, requires_grad=wanted == "weight")
    objective, nll, _ = linear_cross_entropy(hidden, weight, torch.arange(5))
    assert objective.requires_grad == (wanted != "none")
    assert not nll.requires_grad
    if wanted != "none":
        objective.backward()
        assert (hidden.grad is None) == (wanted != "hidden")
        assert (weight.grad is None) == (wanted != "weight")


def test_many_chunks_of_bfloat16_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparq.training.linear_cross_entropy._CHUNK_BYTES", 1)
    hidden = torch.randn(600, 6).bfloat16()
    weight = torch.randn(11, 6).bfloat16().requires_grad_()
    expected = torch.zeros(600, dtype=torch.long)
    linear_cross_entropy(hidden, weight, expected)[0].backward()
    exact = weight.detach().double().requires_grad_()
    functional.cross_entropy(hidden.double() @ exact.T, expected, reduction="sum").backward()
    assert weight.grad is not None
    assert exact.grad is not None
    assert (weight.grad.double() - exact.grad).norm() <= 1e-2 * exact.grad.norm()


def test_no_target_is_no_loss() -> None:
    hidden, weight = torch.randn(0, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    objective, nll, correct = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    objective.backward()
    assert (float(objective.detach()), float(nll), int(correct)) == (0.0, 0.0, 0)
    assert weight.grad is not None
    assert (weight.grad == 0).all()
