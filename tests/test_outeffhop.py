"""The published recipe against numpy on activations that transformers itself hands out."""

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from model_families import FAMILIES, tiny_model
from sparq.errors import SparqError
from sparq.evaluation import measure_outliers


def test_blocks_and_final_norm_against_hidden_states() -> None:
    model = tiny_model("opt")
    batches = [{"input_ids": torch.randint(4, 96, (3, 9))} for _ in range(2)]
    found = measure_outliers(model, batches, compat="outeffhop")
    norms: dict[str, list[float]] = {}
    kurtoses: dict[str, list[float]] = {}
    for batch in batches:
        outputs = []
        handle = model.model.decoder.layers[1].register_forward_hook(lambda _m, _a, out: outputs.append(out))  # noqa: B023
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        handle.remove()
        last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        for name, tensor in (
            ("model.decoder.layers.0", states[1]), ("model.decoder.layers.1", last), ("final norm", states[-1])
        ):  # fmt: skip
            for row in tensor.double().numpy().reshape(3, -1):
                norms.setdefault(name, []).append(np.abs(row).max())
                deviation = row - row.mean()
                kurtoses.setdefault(name, []).append((deviation**4).mean() / (row.std(ddof=1) ** 4 + 1e-6))
    for name in norms:
        assert found.inf_norm[name] == pytest.approx(np.mean(norms[name]), rel=1e-5)
        assert found.kurtosis[name] == pytest.approx(np.mean(kurtoses[name]), rel=1e-4)
    assert found.max_layer_inf_norm == max(found.inf_norm[f"model.decoder.layers.{i}"] for i in (0, 1))


def test_opt_125m_has_61_tensors() -> None:
    shape = {"hidden_size": 24, "ffn_dim": 32, "num_attention_heads": 12, "word_embed_proj_dim": 24, "vocab_size": 99}
    model = OPTForCausalLM(OPTConfig(**shape, num_hidden_layers=12, max_position_embeddings=64)).eval()
    found = measure_outliers(model, [{"input_ids": torch.randint(4, 96, (1, 9))}], compat="outeffhop")
    assert len(found.inf_norm) == len(found.kurtosis) == 61
    assert "model.decoder.layers.11.fc2" in found.inf_norm
    assert "model.decoder.layers.11.self_attn.out_proj" in found.inf_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    found = measure_outliers(tiny_model(family), [{"input_ids": torch.randint(4, 96, (2, 9))}], compat="outeffhop")
    assert len(found.inf_norm) == 2 * 5 + (family != "opt_350m")
    assert found.max_inf_norm >= found.max_layer_inf_norm > 0
    assert found.avg_kurtosis > 1


def test_only_the_first_101_batches_count_for_kurtosis() -> None:
    model = tiny_model("opt")
    batch = {"input_ids": torch.randint(4, 96, (1, 9))}
    other = {"input_ids": torch.randint(4, 96, (1, 9))}
    alone = measure_outliers(model, [batch], compat="outeffhop")
    many = measure_outliers(model, [batch] * 101 + [other] * 40, compat="outeffhop")
    assert many.avg_kurtosis == pytest.approx(alone.avg_kurtosis)
    assert many.inf_norm != pytest.approx(alone.inf_norm)


def test_rows_of_opts_mlp_are_tokens() -> None:
    """As in the published code, because transformers flattens there."""
    model = tiny_model("opt")
    outputs = []
    handle = model.model.decoder.layers[0].fc2.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    batch = {"input_ids": torch.randint(4, 96, (3, 9))}
    found = measure_outliers(model, [batch], compat="outeffhop")
    handle.remove()
    assert outputs[0].shape == (27, 32)
    assert found.inf_norm["model.decoder.layers.0.fc2"] == pytest.approx(outputs[0].abs().amax(dim=1).mean().item())


def test_the_recipe_takes_no_options() -> None:
    for options in ({"modules": True}, {"reduction": "token"}, {"groups": {"all": torch.ones(96, dtype=torch.bool)}}):
        with pytest.raises(SparqError, match="'outeffhop' is a fixed recipe: leave out reduction, groups and modules"):
            measure_outliers(tiny_model("opt"), [], compat="outeffhop", **options)
    with pytest.raises(SparqError, match="unknown compat 'outefhop': did you mean 'outeffhop'"):
        measure_outliers(tiny_model("opt"), [], compat="outefhop")


def test_nothing_to_measure() -> None:
    with pytest.raises(SparqError, match="without a batch"):
        measure_outliers(tiny_model("opt"), [], compat="outeffhop")
