"""Pitch, excitation, spectra and losses against closed forms and slow references."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparq.vocoder.config import FRAME_HOP
from sparq.vocoder.duration import DurationPredictor, duration_loss, whole_frames
from sparq.vocoder.excitation import frame_starts, noise, pulses
from sparq.vocoder.losses import adversarial_loss, discriminator_loss, distances, matching_loss, pitch_loss
from sparq.vocoder.pitch import DEFAULT_HZ, track_pitch
from sparq.vocoder.spectra import log_mel, magnitudes

RATE = 16_000


def _tone(hertz: np.ndarray, harmonics: int = 10) -> np.ndarray:
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    return (0.1 * sum(np.cos(k * phase) / k for k in range(1, harmonics + 1))).astype(np.float32)


@pytest.mark.parametrize("hertz", [70.0, 111.3, 180.0, 260.0, 440.0])
def test_the_pitch_of_a_steady_voice(hertz: float) -> None:
    tracked, voiced = track_pitch(_tone(np.full(RATE, hertz)))
    assert len(tracked) == RATE // FRAME_HOP
    # The outermost windows hang over the ends.
    assert voiced[2:-2].all()
    assert tracked[2:-2] == pytest.approx(hertz, rel=0.01)


def test_a_pitch_that_rises_is_followed() -> None:
    hertz = np.linspace(100, 200, 2 * RATE)
    tracked, _ = track_pitch(_tone(hertz))
    centers = hertz[FRAME_HOP // 2 :: FRAME_HOP]
    assert tracked[3:-3] == pytest.approx(centers[3:-3], rel=0.02)


def test_unvoiced_frames_are_told_and_bridged() -> None:
    random = np.random.default_rng(0)
    voice = _tone(np.full(RATE // 2, 100.0))
    hiss = (0.05 * random.standard_normal(RATE // 2)).astype(np.float32)
    high = _tone(np.full(RATE // 2, 150.0))
    tracked, voiced = track_pitch(np.concatenate([voice, hiss, high]))
    assert voiced[2:23].all()
    assert voiced[27:48].mean() < 0.1
    assert voiced[52:73].all()
    middle = tracked[25:50]
    assert (np.diff(middle) >= -1e-3).all()  # no gap: the logarithm goes up from one voice to the other
    assert math.isclose(tracked[37], math.sqrt(100 * 150), rel_tol=0.1)


def test_silence_and_odd_lengths_have_a_pitch_for_each_frame() -> None:
    tracked, voiced = track_pitch(np.zeros(1001, np.float32))
    assert tracked.tolist() == [DEFAULT_HZ] * 4
    assert not voiced.any()


def test_pulses_are_the_sum_of_their_harmonics() -> None:
    hertz = torch.linspace(90, 140, 12)[None]
    starts = frame_starts(hertz, torch.tensor([0.3], dtype=torch.float64))
    made = pulses(hertz, starts)[0].double().numpy()
    # The slow way: pitch interpolated between the centers of frames, its running sum, and every cosine.
    places = np.arange(12 * FRAME_HOP)
    centers = np.arange(12) * FRAME_HOP + (FRAME_HOP - 1) / 2
    local = np.interp(places, centers, hertz[0].double().numpy())
    phase = 0.3 + np.cumsum(local) / RATE
    harmonics = RATE / 2 / local
    expected = np.zeros(len(places))
    for k in range(1, int(harmonics.max()) + 1):
        expected += np.clip(harmonics - k, 0, 1) * np.cos(2 * np.pi * k * phase)
    expected *= np.sqrt(2 / (harmonics - 1))
    assert made == pytest.approx(expected, abs=0.01)
    assert np.square(made).mean() == pytest.approx(1.0, abs=0.1)


def test_noise_is_the_same_wherever_a_piece_begins() -> None:
    whole = noise(torch.tensor([0]), 30)[0]
    assert torch.equal(noise(torch.tensor([7]), 5)[0], whole[7 * FRAME_HOP : 12 * FRAME_HOP])
    far = noise(torch.tensor([10**6]), 50)
    assert far.std() == pytest.approx(1.0, abs=0.02)


def test_magnitudes_match_a_plain_fourier_transform() -> None:
    samples = torch.randn(2, 1000)
    made = magnitudes(samples, size=128, hop=50)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(128) / 128)
    for frame in range(made.shape[2]):
        piece = samples[1, 50 * frame : 50 * frame + 128].numpy() * window
        assert made[1, :, frame].numpy() == pytest.approx(np.abs(np.fft.rfft(piece)), abs=1e-3)


def test_distances_vanish_for_equals_and_shift_with_loudness() -> None:
    real = 0.1 * torch.randn(2, 16_000)
    same = distances(real, real)
    assert float(same.mel) == float(same.spectral) == 0
    # Twice as loud: every log-mel band is log 2 higher; convergence is 1, and so is the log distance log 2.
    louder = distances(2 * real, real)
    assert float(louder.mel) == pytest.approx(math.log(2), rel=1e-3)
    assert float(louder.spectral) == pytest.approx(1 + math.log(2), rel=1e-3)
    assert float((log_mel(2 * real) - log_mel(real)).mean()) == pytest.approx(math.log(2), rel=1e-3)


def test_silence_gives_finite_gradients() -> None:
    made = torch.zeros(1, 8000, requires_grad=True)
    loss = distances(made, 0.1 * torch.randn(1, 8000))
    (loss.mel + loss.spectral).backward()
    assert made.grad is not None
    assert made.grad.isfinite().all()


def test_the_pitch_loss_counts_voiced_frames_in_octaves() -> None:
    tracked = torch.tensor([[100.0, 100.0, 100.0]])
    predicted = torch.tensor([[200.0, 100.0, 800.0]])
    assert float(pitch_loss(predicted, tracked, torch.tensor([[True, True, False]]))) == pytest.approx(0.5)
    assert float(pitch_loss(predicted, tracked, torch.zeros(1, 3, dtype=torch.bool))) == 0


def test_adversarial_losses_by_hand() -> None:
    real, made = [torch.tensor([1.0, 0.5])], [torch.tensor([0.0, 1.0])]
    assert float(discriminator_loss(real, made)) == pytest.approx(0.125 + 0.5)
    assert float(adversarial_loss(made)) == pytest.approx(0.5)
    assert float(matching_loss([[torch.tensor([1.0, 2.0])]], [[torch.tensor([2.0, 4.0])]])) == pytest.approx(1.5)


@given(
    st.lists(st.floats(1, 40, width=32), min_size=1, max_size=40),
    st.integers(0, 39),
)
@settings(max_examples=100)
def test_rounded_durations_keep_the_sum_and_every_unit(lengths: list[float], cut: int) -> None:
    values = torch.tensor(lengths)
    counts = whole_frames(values)
    assert (counts >= 1).all()
    assert abs(int(counts.sum()) - sum(lengths)) <= 0.5 + 1e-6
    cut = min(cut, len(lengths))
    before = float(values[:cut].double().sum())
    rest = whole_frames(values[cut:], before=before) if cut < len(lengths) else counts[:0]
    assert counts.tolist() == [*whole_frames(values[:cut]).tolist(), *rest.tolist()]


def test_the_duration_predictor_learns_the_mean() -> None:
    torch.manual_seed(1)
    predictor = DurationPredictor(3, 4)
    adam = torch.optim.Adam(predictor.parameters(), lr=3e-3)
    speaker, real = torch.zeros(16, 4), torch.ones(16, 30, dtype=torch.bool)
    draw = torch.Generator().manual_seed(0)
    for _ in range(150):
        units = torch.randint(0, 3, (16, 30), generator=draw)
        # Unit u lasts 1 or 3 + 4 u frames, each half of the time.
        durations = torch.where(torch.rand(16, 30, generator=draw) < 0.5, 1, 3 + 4 * units)
        loss = duration_loss(predictor(units, speaker, real), durations, real)
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.inference_mode():
        units = torch.randint(0, 3, (300,), generator=draw)
        lengths = predictor.frames(units, torch.zeros(4))
    means = [float(lengths[units == unit].mean()) for unit in range(3)]
    assert means == pytest.approx([2, 4, 6], rel=0.15)


def test_padding_does_not_change_durations() -> None:
    predictor = DurationPredictor(5, 4).eval()
    units, speaker = torch.randint(0, 5, (1, 12)), torch.randn(1, 4)
    alone = predictor(units, speaker, torch.ones(1, 12, dtype=torch.bool))
    padded = torch.cat([units, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    real = torch.arange(17)[None] < 12
    assert torch.allclose(predictor(padded, speaker, real)[:, :12], alone, atol=1e-5)
