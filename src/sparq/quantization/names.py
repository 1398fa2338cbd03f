"""Precisions as people write them: w4a4-rotation, w4a16g128-gptq."""

import re
from typing import Any

from sparq.errors import SparqError

_NAME = re.compile(r"w(\d+)a(\d+)(?:g(\d+))?-([a-z0-9_]+)")


def settings_of_name(name: str) -> dict[str, Any]:
    """Return the settings that a name stands for: bits of weights and activations, group size if any, and method.

    Raises:
        SparqError: the name is not of this form. Whether its values exist, `QuantizationScheme` says.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise SparqError(f"{name!r} is not a scheme: expected for example w4a4-rotation or w4a16g128-gptq")
    weights, activations, group, method = found.groups()
    settings = {"method": method, "weight_bits": int(weights), "activation_bits": int(activations)}
    return settings if group is None else {**settings, "group_size": int(group)}
