"""What an attention computes, as data: one specification for every variant, with the names that users write.

Let s be one row of scores over the keys that a query may see, m = max(s), Z = sum(exp(s - m)).

| normalization       | formula                                | as softmax times a factor        | a key of value 0   |
|---------------------|----------------------------------------|----------------------------------|--------------------|
| `vanilla`           | exp(s) / sum(exp(s))                   | softmax(s)                       | none               |
| `softmax1`          | exp(s) / (1 + sum(exp(s)))             | softmax(s) * sigmoid(m + log(Z)) | with logit 0       |
| `max_shift`         | exp(s - m) / (1 + sum(exp(s - m)))     | softmax(s) * Z / (1 + Z)         | with logit m       |
| `learned_sink`      | exp(s) / (exp(b) + sum(exp(s)))        | ... * sigmoid(m + log(Z) - b)    | with logit b       |
| `mean`              | softmax1(s - mean(s))                  | ... * sigmoid(... - mean(s))     | with logit mean(s) |
| `l1`                | softmax1(s / sum(abs(s)))              |                                  | with logit 0       |
| `none`              | `softmax1`, computed as written        |                                  |                    |
| `vanilla_max_shift` | `vanilla`, computed as softmax(s - m)  |                                  |                    |

`softmax1` is Miller (2023) and Hu et al. (2024a), exactly. `max_shift` is SpARQ equation 3.2 read literally. Both
papers call theirs Softmax_1 and both speak of subtracting the maximum, but only in the first does that leave the value
as it is: `max_shift` never gives a row less than half of its mass, so it has no true no-op. `none`, `l1` and `mean` are
the other rows of SpARQ table 4, where they ended in NaN; the paper gives no formula for `l1` and `mean`, and these are
the plain readings of "L1 normalization" and "mean-centering" of the input vector. `none` overflows beyond logits of 88,
as the paper says. `vanilla_max_shift` is SpARQ table 7; it is the pretrained softmax, as every library computes it.
`learned_sink` holds both ends: b = -inf is `vanilla`, b = 0 is `softmax1`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sparq.errors import SparqError, near_matches, unknown

Normalization = Literal["vanilla", "softmax1", "max_shift", "learned_sink", "none", "l1", "mean", "vanilla_max_shift"]
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

GateForm = Literal["linear", "mlp", "all_heads", "elementwise"]
GATE_FORMS: tuple[GateForm, ...] = get_args(GateForm)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Clipped softmax (Bondarenko et al. 2023, section 4.1): clip((eta - gamma) * p + gamma, 0, 1), gamma = -alpha / T.

    Attributes:
        alpha: how far below 0 probabilities are stretched, times `length`; 12 for OPT.
        eta: the upper end, at least 1.
        length: T, the sequence length of training. It stays the same whatever the current length is.
    """

    alpha: float = 12.0
    eta: float = 1.0
    length: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < self.length:
            raise SparqError(f"clip alpha is {self.alpha}: it must be at least 0 and less than length, {self.length}")
        if self.eta < 1:
            raise SparqError(f"clip eta is {self.eta}: it must be at least 1")

    @property
    def gamma(self) -> float:
        """The lower end of the stretched interval."""
        return -self.alpha / self.length


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Gated attention (Bondarenko et al. 2023, section 4.2): each head's output times sigmoid(G(x)).

    Attributes:
        form: G. `linear`: a linear map of head_dim inputs to 1, for each head its own. `mlp`: the same through a hidden
            layer of 4 numbers and a ReLU. `all_heads`: one linear map of all inputs to a number for each head.
            `elementwise`: one linear map of all inputs to a number for each output (Qiu et al. 2025).
        pi: value of the gates at the start; .25 for OPT.
        rescale: multiply by 1 / pi, so that a pretrained model starts as it was (Bondarenko et al. 2023, appendix B.6,
            which does so when it fine-tunes). False for training from scratch.
    """

    form: GateForm = "linear"
    pi: float = 0.25
    rescale: bool = True

    def __post_init__(self) -> None:
        if self.form not in GATE_FORMS:
            raise unknown("gate form", self.form, GATE_FORMS)
        if not 0 < self.pi < 1:
            raise SparqError(f"gate pi is {self.pi}: it must be between 0 and 1")


_PARTS: dict[str, Clip | Gate] = {
    "clipped": Clip(),
    "gated": Gate(),
    "gated_mlp": Gate(form="mlp"),
    "gated_all_heads": Gate(form="all_heads"),
    "gated_elementwise": Gate(form="elementwise"),
}

ATTENTION_NAMES: tuple[str, ...] = (*NORMALIZATIONS, *_PARTS)
"""The words of a name; `softmax1+gated` joins them."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What the attention of a model computes.

    Attributes:
        normalization: how a row of scores becomes probabilities.
        clip: stretch and clip the probabilities; None for not.
        gate: multiply each head's output by a gate; None for not.
    """

    normalization: Normalization = "vanilla"
    clip: Clip | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise unknown("attention", self.normalization, NORMALIZATIONS)

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | AttentionSpec") -> "AttentionSpec":
        """Return the specification of a name such as `softmax1` or `softmax1+clipped`, or of `to_config`'s value.

        Raises:
            SparqError: an unknown word or setting, or two words of one kind.
        """
        if isinstance(value, AttentionSpec):
            return value
        if isinstance(value, str):
            return cls(**_parse_name(value))
        try:
            settings = dict(value)
            for name, part in (("clip", Clip), ("gate", Gate)):
                if settings.get(name) is not None:
                    settings[name] = part(**settings[name])
            return cls(**settings)
        except TypeError as error:
            raise SparqError(f"attention {value!r} is not a specification: {error}") from error

    @property
    def name(self) -> str:
        """The name in words; a part with settings of its own carries them in brackets."""
        words = []
        for part in (self.clip, self.gate):
            if part is None:
                continue
            word = next((word for word, default in _PARTS.items() if default == part), None)
            words.append(word or str(part).replace(" ", ""))
        plain = self.normalization == "vanilla" and words
        return "+".join(words if plain else [self.normalization, *words])

    def to_config(self) -> str | dict[str, Any]:
        """Return what a config keeps: the name if it says all, else the settings."""
        parts = [part for part in (self.clip, self.gate) if part is not None]
        return self.name if all(part in _PARTS.values() for part in parts) else dataclasses.asdict(self)

    @property
    def has_parameters(self) -> bool:
        """Whether it brings weights of its own."""
        return self.normalization == "learned_sink" or self.gate is not None


def _parse_name(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for word in name.split("+"):
        if word in NORMALIZATIONS:
            kind, value = "normalization", word
        elif word in _PARTS:
            kind, value = ("clip" if isinstance(_PARTS[word], Clip) else "gate"), _PARTS[word]  # type: ignore[assignment]
        else:
            raise SparqError(f"unknown attention {word!r}: {near_matches(word, ATTENTION_NAMES)}")
        if kind in settings:
            raise SparqError(f"attention {name!r} names two of a kind ({kind}): one word of each can be joined by +")
        settings[kind] = value
    return settings
