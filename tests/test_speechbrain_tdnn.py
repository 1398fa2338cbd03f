"""Speaker vectors by the networks of SpeechBrain; what needs the package is skipped without it."""

import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparq.errors import SparqError
from sparq.vocoder.speaker import SpeakerEncoder, load_speaker_encoder


def speech(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(n) + 0.05 * np.sin(np.arange(n) / 9)).astype(np.float32) for n in lengths]


# What must hold without SpeechBrain, too


class Evil:
    """A pickle of it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    file = tmp_path / "embedding_model.ckpt"
    for protocol in (2, 4):
        torch.save({"fc.conv.weight": Evil(tmp_path / "harm")}, file, pickle_protocol=protocol)
        with pytest.raises(SparqError, match="is damaged or holds more than tensors, which are not unpickled"):
            load_speaker_encoder(str(tmp_path))
    assert not (tmp_path / "harm").exists()
    for content in ([torch.zeros(2)], {"fc.conv.weight": "text"}, torch.zeros(2)):
        torch.save(content, file)
        with pytest.raises(SparqError, match="holds other things than named tensors"):
            load_speaker_encoder(str(tmp_path))
    file.write_bytes(b"no pickle")
    with pytest.raises(SparqError, match="is damaged"):
        load_speaker_encoder(str(tmp_path))


def test_hyperparams_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "hyperparams.yaml").write_text(f"harm: !apply:os.mkdir ['{tmp_path / 'harm'}']\n")
    torch.save({"fc.conv.weight": torch.zeros(2)}, tmp_path / "embedding_model.ckpt")
    with pytest.raises(SparqError):
        load_speaker_encoder(str(tmp_path))
    assert not (tmp_path / "harm").exists()


def test_without_speechbrain_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "speechbrain.lobes.features", None)
    save_file({"fc.conv.weight": torch.zeros(2)}, tmp_path / "embedding_model.safetensors")
    message = r"embedding_model\.safetensors needs speechbrain: pip install 'sparq\[speakers\]'"
    with pytest.raises(SparqError, match=message):
        load_speaker_encoder(str(tmp_path))


# The networks


def _network(kind: str, *, tiny: bool = False) -> tuple[torch.nn.Module, int]:
    """A random network in the published shape or, with few channels, in its layout, and its mel bands."""
    pytest.importorskip("speechbrain")
    if kind == "ecapa":
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

        sizes = {"channels": [16] * 4 + [24], "attention_channels": 4, "se_channels": 6, "res2net_scale": 2}
        published = {"channels": [1024] * 4 + [3072]}
        mels, network = (10, ECAPA_TDNN(10, lin_neurons=5, **sizes)) if tiny else (80, ECAPA_TDNN(80, **published))
    else:
        from speechbrain.lobes.models.Xvector import Xvector

        sizes = {"tdnn_channels": [8, 8, 8, 8, 12]}
        mels, network = (10, Xvector(in_channels=10, lin_neurons=5, **sizes)) if tiny else (24, Xvector(in_channels=24))
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return network.eval(), mels


@pytest.mark.parametrize(("kind", "dim", "parameters"), [("ecapa", 192, 20_767_552), ("xvector", 512, 4_211_604)])
def test_the_published_shapes_are_read_off_the_tensors(kind: str, dim: int, parameters: int, tmp_path: Path) -> None:
    network, mels = _network(kind)
    assert sum(p.numel() for p in network.parameters()) == parameters
    torch.save(network.state_dict(), tmp_path / "embedding_model.ckpt")
    encoder = load_speaker_encoder(str(tmp_path))
    assert isinstance(encoder, SpeakerEncoder)
    assert encoder.dim == dim
    clips = speech(16_000, 4_000, 320, 1, 9_999)
    vectors = encoder.embed(clips)
    for clip, vector in zip(clips, vectors, strict=True):
        np.testing.assert_allclose(vector, encoder.embed([clip])[0], atol=1e-5)
    # SpeechBrain's own path from a waveform to a vector, with the parts that `hyperparams.yaml` lists.
    from speechbrain.inference.classifiers import EncoderClassifier
    from speechbrain.lobes.features import Fbank
    from speechbrain.processing.features import InputNormalization

    parts = {
        "compute_features": Fbank(n_mels=mels),
        "mean_var_norm": InputNormalization(norm_type="sentence", std_norm=False),
        "embedding_model": network,
        "classifier": torch.nn.Identity(),
    }
    reference = EncoderClassifier(modules=parts, hparams={})
    for clip, vector in zip(clips[:2], vectors[:2], strict=True):
        torch.manual_seed(0)  # x-vectors have noise
        expected = reference.encode_batch(torch.from_numpy(clip)[None])[0, 0].numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)


@pytest.mark.parametrize("kind", ["ecapa", "xvector"])
def test_speechbrain_networks_of_other_sizes(kind: str, tmp_path: Path) -> None:
    network, _ = _network(kind, tiny=True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    torch.save(OrderedDict(network.state_dict()), tmp_path / "a" / "embedding_model.ckpt")
    save_file(network.state_dict(), tmp_path / "b" / "embedding_model.safetensors")
    pickled, plain = (load_speaker_encoder(str(tmp_path / name)) for name in ("a", "b"))
    assert pickled.fingerprint == plain.fingerprint
    assert (pickled.dim, pickled.embed(speech(5_000)).shape) == (5, (1, 5))
    before = torch.get_rng_state()
    first, second = pickled.embed(speech(5_000)), plain.embed(speech(5_000))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("ecapa", lambda t: t.pop("asp_bn.norm.running_var"), r"does not hold the ECAPA-TDNN .* Missing key.*asp_bn"),
        ("ecapa", lambda t: t.pop("mfa.conv.conv.weight"), r"does not hold the ECAPA-TDNN .*: no 'mfa\.conv"),
        ("ecapa", lambda t: t.update(odd=torch.zeros(1)), r"does not hold the ECAPA-TDNN .* Unexpected key.*odd"),
        ("ecapa", lambda t: t.update({"fc.conv.bias": torch.zeros(7)}), r"does not hold .* size mismatch for fc"),
        ("xvector", lambda t: t.pop("blocks.14.norm.bias"), r"does not hold the x-vector .* Missing key.*blocks\.14"),
        ("xvector", lambda t: t.pop("blocks.16.w.weight"), r"does not hold the x-vector .*: no 'blocks\.16"),
        ("xvector", lambda t: t.update(odd=torch.zeros(1)), r"does not hold the x-vector .* Unexpected key.*odd"),
    ],
)
def test_speechbrains_tensors_must_all_fit(
    kind: str, change: Callable[[dict], object], message: str, tmp_path: Path
) -> None:
    tensors = _network(kind, tiny=True)[0].state_dict()
    change(tensors)
    torch.save(tensors, tmp_path / "embedding_model.ckpt")
    with pytest.raises(SparqError, match=message) as caught:
        load_speaker_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)
