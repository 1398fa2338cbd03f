"""What settings are when they are not given: a method's own, and presets where papers and original code differ."""

from typing import Any

from sparq.errors import SparqError, unknown

_ASYMMETRIC = {"weight_symmetric": False, "activation_symmetric": False}
_OWN: dict[str, dict[str, Any]] = {
    "omniquant": _ASYMMETRIC,
    "affinequant": _ASYMMETRIC,
    "gptq": {**_ASYMMETRIC, "weight_range": "mse"},
    "rotation": {**_ASYMMETRIC, "weight_range": "mse", "key_rotation": True},
    "best": {**_ASYMMETRIC, "weight_range": "mse", "key_rotation": True},
}

_CLIPPED_BITS, _CLIP, _GROUP_CLIP = 4, 0.9, 0.95
"""Rotated inputs of so few bits at most are clipped so by default, groups of them less: see docs/quantization.md."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {  # SpARQ, appendix E.2; its calibration batch of 256 sequences is the caller's data
        "smoothquant": {"smoothing_alpha": 0.5},
        "omniquant": {"group_size": 128},
        "affinequant": {"stability": 0.01},
    },
    "anchor": {  # the original authors' code, where it differs from the defaults here
        "smoothquant": {},
        "omniquant": {"epochs": 20},
        "affinequant": {"epochs": 20},
    },
    "fast": {
        "omniquant": {"epochs": 2},
        "affinequant": {"epochs": 2},
        "best": {"epochs": 1},
    },
}
"""Settings by preset and method; what depends on bits is added by `defaults`."""


def defaults(
    method: str, weight_bits: Any, activation_bits: Any, preset: str | None, *, grouped: bool = False
) -> dict[str, Any]:
    """Return the settings that differ from a `QuantizationScheme`'s own defaults; bits may be invalid still.

    All methods but `rtn` and `smoothquant` have zero points for weights and activations; `gptq`, `rotation` and `best`
    search the range of weights (`mse`), and the last two clip inputs of 4 bits or less to 0.9 of their range, or 0.95
    where groups of them share one.

    - `paper`: SpARQ, appendix E.2: smoothing_alpha 0.5, OmniQuant with groups of 128, AffineQuant's stability 0.01.
    - `anchor`: the original code. Queries, keys and values have the bits of activations, with SmoothQuant probabilities
      too; OmniQuant and AffineQuant train for 20 epochs, 40 with weights of 2 bits.
    - `fast`: a budget of minutes instead of tens of minutes for a model of 135 million parameters on two cores.

    Raises:
        SparqError: the preset does not exist, or not for this method.
    """
    settings = dict(_OWN.get(method, {}))
    if method in ("rotation", "best") and isinstance(activation_bits, int) and activation_bits <= _CLIPPED_BITS:
        settings["activation_clip"] = _GROUP_CLIP if grouped else _CLIP
    if preset is None:
        return settings
    if preset not in PRESETS:
        raise unknown("preset", str(preset), list(PRESETS))
    if method not in PRESETS[preset]:
        raise SparqError(f"the preset {preset!r} is for {', '.join(PRESETS[preset])}, not for {method!r}: leave it out")
    settings |= PRESETS[preset][method]
    if preset == "anchor":
        inside = ("query_bits", "key_bits", "value_bits")
        settings |= dict.fromkeys((*inside, "probability_bits") if method == "smoothquant" else inside, activation_bits)
        if method != "smoothquant" and weight_bits == 2:
            settings["epochs"] = 40
    return settings
