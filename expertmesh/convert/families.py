"""The families of published models that are known, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from expertmesh.convert.family import Family
from expertmesh.convert.mixtral import Mixtral
from expertmesh.convert.olmoe import Olmoe
from expertmesh.convert.openmoe.family import OpenMoe
from expertmesh.convert.qwen3_moe import Qwen3Moe

_ALL: tuple[Family, ...] = (OpenMoe(), Mixtral(), Olmoe(), Qwen3Moe())
FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ALL})
