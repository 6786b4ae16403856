"""One case after another, each with the device's memory to itself."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch


def alone(measure: Callable[[Any], dict[str, Any]], setting: Any) -> dict[str, Any]:
    """Measure a case and print what was found; what does not fit is a result too.

    Args:
        measure: From the setting to figures by name.
        setting: Has a ``name``.

    Returns:
        The figures, rounded, or the error's first line as ``error``.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        found = measure(setting)
    except (torch.OutOfMemoryError, ImportError) as error:
        found = {"error": str(error).splitlines()[0]}
    numbers = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    shown = {k: v for k, v in numbers.items() if not isinstance(v, dict)}
    print(f"{setting.name}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
    return numbers
