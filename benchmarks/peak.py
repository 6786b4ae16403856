"""How much of a device's peak is used."""

import torch

PEAK = {"H200": 989.4e12, "H100": 989.4e12, "A800": 312e12, "A100": 312e12}
"""bfloat16 operations per second without sparsity, by a part of the device's name."""
MFU = "tokens/s * 3 * forward FLOPs per token / the device's bfloat16 peak"


def utilisation(flops_per_second: float, device: torch.device) -> float | None:
    """The share of the peak; None for a device whose peak is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK.items() if part in name), None)
    return None if peak is None else flops_per_second / peak
