"""Where models compute: on the GPU that PyTorch sees, or else on the CPU."""

import torch


def compute_device() -> torch.device:
    """Return the current CUDA device, or the CPU where PyTorch sees none; `CUDA_VISIBLE_DEVICES=` hides them."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
