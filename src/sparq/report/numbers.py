"""Numbers and names as the tables print them."""

import math

_METHODS = {
    "rtn": "RTN",
    "smoothquant": "SmoothQuant",
    "omniquant": "OmniQuant",
    "affinequant": "AffineQuant",
    "gptq": "GPTQ",
}


def show_number(value: float | None) -> str:
    """Return a number in a few characters: 12.40, 348.2, 12,700, 1.3e7 or 3.1e-7; `-` if absent.

    >>> show_number(12_700.4)
    '12,700'
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    if size >= 999_999.5 or 0 < size < 0.005:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits}e{int(power)}"
    if size >= 999.95:
        return f"{value:,.0f}"
    if size >= 99.995:
        return f"{value:.1f}"
    return f"{value:.2f}"


def show_change(percent: float | None) -> str:
    """Return a relative change in percent with its sign, e.g. `+197.3`; `-` if absent."""
    if percent is None:
        return "-"
    return ("+" if percent > 0 else "") + show_number(percent)


def show_interval(value: float, low: float | None, high: float | None) -> str:
    """Return a number with its interval, where there is one.

    >>> show_interval(8.29, 4.4, 12.55)
    '8.29 [4.40, 12.55]'
    """
    if low is None or high is None:
        return show_number(value)
    return f"{show_number(value)} [{show_number(low)}, {show_number(high)}]"


def show_seconds(seconds: float) -> str:
    """Return a duration, e.g. `8.4 s`, `12 min 05 s` or `2 h 03 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def show_bytes(size: float) -> str:
    """Return a size in binary units, e.g. `3.21 GiB`."""
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def precision_label(precision: str) -> str:
    """Return a precision as tables print it.

    >>> precision_label("w4a4-smoothquant")
    'W4A4 SmoothQuant'
    """
    bits, _, method = precision.partition("-")
    return f"{bits.upper()} {_METHODS.get(method, method)}" if method else bits


def metric_label(metric: str) -> str:
    """Return a metric's short name, e.g. `ASR WER` for `asr_wer`."""
    known = {
        "textlm_ppl": "TextLM PPL",
        "speechlm_ppl": "SpeechLM PPL",
        "asr_wer": "ASR WER",
        "tts_uer": "TTS UER",
        "tts_cer": "TTS CER",
        "tts_wer": "TTS WER",
    }
    return known.get(metric, metric)


def listed(parts: list[str]) -> str:
    """Return `a`, `a and b` or `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
