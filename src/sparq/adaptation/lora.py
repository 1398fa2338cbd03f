"""What is trained: everything, or low-rank adapters with the new vocabulary (LoRA; SpARQ section 4.2, appendix E.1)."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from transformers import PreTrainedModel

from sparq.adaptation.dropout import Dropout
from sparq.adaptation.lora_linear import LoraLinear
from sparq.errors import SparqError
from sparq.models.families import family_of, named_linears


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA: W x + (alpha / rank) B A x, with B = 0 at the start (Hu et al. 2021).

    Attributes:
        rank: r; the papers' appendix has 256.
        alpha: the papers' appendix has 256.
        dropout: on the adapters' input; the papers have 0.05.
        targets: names of linear layers; empty takes the family's q, k, v, o and MLP, as the papers do.
    """

    rank: int = 256
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] = ()


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Freeze a SpeechLM and put adapters on its linear layers; the new embeddings and head stay trained.

    OPT-350m's project_in and project_out, which join the new embedding to the hidden size, are trained too.

    Raises:
        SparqError: a target matches no layer, or the rank exceeds a layer.
    """
    family = family_of(model)
    targets = settings.targets or family.lora_targets
    available = sorted({name.rpartition(".")[2] for name in family.linears})
    if missing := [target for target in targets if target not in available]:
        raise SparqError(f"LoRA target {missing[0]!r} matches no layer of {family.model_type}; it has {available}")
    for name, linear in named_linears(model):
        shape = tuple(linear.get_parameter("weight").shape)
        if name.rpartition(".")[2] in targets and settings.rank > min(shape):
            raise SparqError(f"LoRA rank {settings.rank} exceeds layer {name} of shape {shape}: at most {min(shape)}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    with quiet_peft():
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for module in vocabulary_modules(model).values():
        module.requires_grad_(True)
    quicken(adapted)
    return adapted


def quicken(adapted: PeftModel) -> None:
    """Let PEFT's layers compute as `LoraLinear` and `Dropout` do; their weights and files stay PEFT's."""
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            rates = {name: getattr(dropout, "p", 0.0) for name, dropout in module.lora_dropout.items()}
            module.lora_dropout.update({name: Dropout(rate) for name, rate in rates.items() if rate > 0})
        if type(module) is Linear:
            module.__class__ = LoraLinear


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.23 for an attribute by its deprecated name; users cannot do anything about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def vocabulary_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules that the new vocabulary makes new: embedding, head (unless tied) and their projections."""
    modules = {"embedding": model.get_input_embeddings()}
    head = model.get_output_embeddings()
    if head.weight is not modules["embedding"].weight:
        modules["head"] = head
    decoder = model.get_decoder()
    for name in ("project_in", "project_out"):
        if getattr(decoder, name, None) is not None:
            modules[name] = getattr(decoder, name)
    return modules


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(parameters: Sequence[nn.Parameter]) -> int:
    """Return how many numbers they hold."""
    return sum(parameter.numel() for parameter in parameters)
