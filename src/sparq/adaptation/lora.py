"""What is trained: everything, or low-rank adapters with the new vocabulary (LoRA; SpARQ section 4.2, appendix E.1)."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from transformers import PreTrainedModel

from sparq.adaptation.dropout import Dropout
from sparq.adaptation.initialization import remember_start, start_from_inputs, start_from_loftq
from sparq.adaptation.loftq import LoftQ, loftq_layers
from sparq.adaptation.lora_linear import LoraLinear
from sparq.adaptation.quantized_base import LowRank, quantize_base
from sparq.adaptation.settings import LoraSettings
from sparq.data import Batch
from sparq.errors import SparqError
from sparq.models.conversion import attention_parameters
from sparq.models.families import family_of, named_linears


def add_lora(
    model: PreTrainedModel,
    settings: LoraSettings,
    *,
    dtype: torch.dtype | None = None,
    batches: Iterable[Batch] = (),
) -> PeftModel:
    """Freeze a SpeechLM and put adapters on its linear layers; the new embeddings and head stay trained.

    OPT-350m's project_in and project_out, which join the new embedding to the hidden size, are trained too, and so are
    the sinks and gates that an attention brings. The model is changed in place.

    Args:
        model: in float32 if `settings.reads_weights`: files refer to the weights as they are, not rounded before.
        settings: what adapters, on what base.
        dtype: what the model shall compute in; None leaves its parameters as they are.
        batches: training batches, for `eva`; as many as are given are held.

    Raises:
        SparqError: a setting is wrong, a target matches no layer, the rank exceeds a layer, the weights are read and
            not in float32, or something is missing: data for `eva`, bitsandbytes for a quantized base.
    """
    settings.validate()
    family = family_of(model)
    targets = settings.targets or family.lora_targets
    _check_targets(model, targets, settings.rank)
    if settings.reads_weights and model.dtype != torch.float32:
        raise SparqError(
            f"these LoRA settings need a model in float32, not {model.dtype}: load it so, and give `dtype`"
        )
    starts: dict[str, LoftQ] = {}
    if settings.base is not None:
        if settings.initialization == "loftq":
            starts = loftq_layers(
                model, targets, rank=settings.rank, base=settings.base, iterations=settings.loftq_iterations
            )
        removed: dict[str, LowRank] = {
            name: start.removed for name, start in starts.items() if start.removed is not None
        }
        quantize_base(model, settings.base, removed)
    with quiet_peft():
        adapted = get_peft_model(model, _peft_config(settings, targets), autocast_adapter_dtype=False)
    if settings.initialization in ("pissa", "olora"):
        remember_start(adapted, settings)
    elif settings.initialization == "loftq":
        start_from_loftq(adapted, starts, settings)
    elif settings.initialization == "eva":
        start_from_inputs(adapted, list(batches), settings)
    for module in vocabulary_modules(model).values():
        module.requires_grad_(True)
    own = attention_parameters(model)
    for parameter in own.values():
        parameter.requires_grad_(True)
    if dtype is not None:
        # A learned sink is float32 in a model of any type.
        sinks = {id(parameter) for name, parameter in own.items() if name.endswith(".sink")}
        for parameter in adapted.parameters():
            if parameter.is_floating_point() and id(parameter) not in sinks:
                parameter.data = parameter.data.to(dtype)
    quicken(adapted)
    return adapted


def _check_targets(model: PreTrainedModel, targets: Sequence[str], rank: int) -> None:
    family = family_of(model)
    available = sorted({name.rpartition(".")[2] for name in family.linears})
    if missing := [target for target in targets if target not in available]:
        raise SparqError(f"LoRA target {missing[0]!r} matches no layer of {family.model_type}; it has {available}")
    for name, linear in named_linears(model):
        shape = tuple(linear.get_parameter("weight").shape)
        if name.rpartition(".")[2] in targets and rank > min(shape):
            raise SparqError(f"LoRA rank {rank} exceeds layer {name} of shape {shape}: at most {min(shape)}")


def _peft_config(settings: LoraSettings, targets: Sequence[str]) -> LoraConfig:
    # PEFT's own LoftQ needs a GPU and leaves s out; EVA's ranks would differ by layer unless rho is 1.
    own = settings.initialization in ("kaiming", "loftq")
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights=True if own else settings.initialization,
        eva_config=EvaConfig(rho=1.0) if settings.initialization == "eva" else None,
        task_type="CAUSAL_LM",
    )


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
    """Leave out warnings of PEFT 0.21 that users cannot do anything about."""
    with warnings.catch_warnings():
        # It asks transformers 5.23 for an attribute by its deprecated name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        # EVA's advice, which is for models that do not fit into memory.
        warnings.filterwarnings("ignore", message="lora with eva initialization", category=UserWarning)
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
