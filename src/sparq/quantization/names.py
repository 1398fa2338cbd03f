"""Precisions as people write them: w4a4-rotation, w4a16g128-gptq, w4a4kv4-rotation, w4g64a4g64-best."""

import re
from typing import Any

from sparq.errors import SparqError

_NAME = re.compile(r"w(\d+)(?:g(\d+))?a(\d+)(?:kv(\d+))?(?:g(\d+))?-([a-z0-9_]+)")


def settings_of_name(name: str) -> dict[str, Any]:
    """Return the settings that a name stands for: bits of weights and activations, and method.

    If named, bits of keys and values follow after `kv`, and the size of groups after `g`: once, for the weights alone,
    or after the bits of both, w4g64a4g64.

    Raises:
        SparqError: the name is not of this form. Whether its values exist, `QuantizationScheme` says.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise SparqError(f"{name!r} is not a scheme: expected for example w4a4-rotation or w4a16g128-gptq")
    weights, weight_group, activations, cache, group, method = found.groups()
    settings: dict[str, Any] = {"method": method, "weight_bits": int(weights), "activation_bits": int(activations)}
    if cache is not None:
        settings |= {"key_bits": int(cache), "value_bits": int(cache)}
    if weight_group is not None and group is not None:
        if weight_group != group:
            raise SparqError(f"{name!r} has groups of {weight_group} and of {group}: inputs share the weights' groups")
        settings["activation_granularity"] = "group"
    size = weight_group or group
    return settings if size is None else {**settings, "group_size": int(size)}
