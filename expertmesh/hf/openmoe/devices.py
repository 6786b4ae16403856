"""Device maps in the published names, in ours, or both."""

from collections.abc import Iterable, Mapping
from typing import Any

from expertmesh.convert.layout import Layout
from expertmesh.errors import UserError, nearest
from expertmesh.hf.openmoe.weights import PREFIX

DeviceMap = dict[str, Any]


def our_device_map(device_map: Mapping[str, Any], layout: Layout) -> DeviceMap:
    """A device map in the names of our modules.

    Args:
        device_map: Names of modules or tensors to devices, ``"cpu"`` or ``"disk"``. A longer name
            goes before a shorter one, and ``""`` is everything else. ``model.layers.3`` and
            ``model.blocks.3`` are the same block.
        layout: Of the model.

    Returns:
        As few names as say it.

    Raises:
        UserError: If a name is of nothing, a parameter is on no device, or its parts are on two.
    """
    used: set[str] = set()
    device_of = {PREFIX + name: _device(name, device_map, layout, used) for name in layout.of_ours}
    if unknown := sorted(set(device_map) - used - {""}):
        hint = nearest(unknown[0], _modules(layout.of_theirs))
        raise UserError(
            f"device_map names what the model does not have: {unknown}; expected names such as "
            f"model.embed_tokens, model.layers.0, model.norm, lm_head{hint}"
        )
    return _joined(device_of)


def _device(name: str, device_map: Mapping[str, Any], layout: Layout, used: set[str]) -> Any:
    devices = []
    for piece in layout.of_ours[name]:
        keys = [key for key in device_map if _covers(key, PREFIX + name, piece.theirs)]
        if not keys:
            raise UserError(
                f"device_map says nothing of {piece.theirs}; add it, or '' for the rest"
            )
        used.update(keys)
        devices.append(device_map[max(keys, key=len)])
    if any(device != devices[0] for device in devices):
        raise UserError(
            f"{' and '.join(sorted({piece.theirs for piece in layout.of_ours[name]}))} are one "
            f"parameter here and must be on one device, got {devices}"
        )
    return devices[0]


def _covers(key: str, *names: str) -> bool:
    return key == "" or any(name == key or name.startswith(f"{key}.") for name in names)


def _joined(device_of: Mapping[str, Any]) -> DeviceMap:
    """The same by modules: one entry where all below a name are on one device."""
    if len({str(device) for device in device_of.values()}) == 1:
        return {"": next(iter(device_of.values()))}
    joined: DeviceMap = {}

    def visit(prefix: str, depth: int) -> None:
        below = {name: device for name, device in device_of.items() if _covers(prefix, name)}
        first = next(iter(below.values()))
        if depth > 1 and all(device == first for device in below.values()):
            joined[prefix] = first
            return
        children = dict.fromkeys(".".join(name.split(".")[: depth + 1]) for name in below)
        for child in children:
            visit(child, depth + 1)

    visit(PREFIX.rstrip("."), 1)
    return joined


def _modules(names: Iterable[str]) -> list[str]:
    """Every name above these."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts)):
            found[".".join(parts[:length])] = None
    return list(found)
