"""Names of attentions, their settings, and what is wrong with others."""

import pytest

from sparq.attention import ATTENTION_NAMES, AttentionSpec, Clip, Gate
from sparq.errors import SparqError


@pytest.mark.parametrize(
    "name", [*ATTENTION_NAMES, "softmax1+clipped", "softmax1+gated", "max_shift+clipped+gated_mlp"]
)
def test_a_name_is_read_and_written(name: str) -> None:
    spec = AttentionSpec.parse(name)
    assert spec.name == name
    assert spec.to_config() == name
    assert AttentionSpec.parse(spec.to_config()) == spec


def test_settings_of_its_own_survive_the_config() -> None:
    spec = AttentionSpec(normalization="softmax1", clip=Clip(alpha=4, length=2048), gate=Gate(form="mlp", pi=0.5))
    config = spec.to_config()
    assert config == {
        "normalization": "softmax1",
        "clip": {"alpha": 4, "eta": 1.0, "length": 2048},
        "gate": {"form": "mlp", "pi": 0.5, "rescale": True},
    }
    assert AttentionSpec.parse(config) == spec
    assert spec.name == "softmax1+Clip(alpha=4,eta=1.0,length=2048)+Gate(form='mlp',pi=0.5,rescale=True)"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sofmax1", "unknown attention 'sofmax1': did you mean 'softmax1'"),
        ("softmax1+vanilla", "names two of a kind \\(normalization\\)"),
        ("gated+gated_mlp", "names two of a kind \\(gate\\)"),
        ({"normalization": "softmax1", "clipped": True}, "is not a specification: .*'clipped'"),
        ({"gate": {"form": "lin"}}, "unknown gate form 'lin': did you mean 'linear'"),
        ({"gate": {"pi": 1.0}}, "gate pi is 1.0: it must be between 0 and 1"),
        ({"clip": {"alpha": 12, "length": 10}}, "clip alpha is 12: it must be at least 0 and less than length, 10"),
        ({"clip": {"eta": 0.9}}, "clip eta is 0.9: it must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(value: object, message: str) -> None:
    with pytest.raises(SparqError, match=message):
        AttentionSpec.parse(value)  # type: ignore[arg-type]
