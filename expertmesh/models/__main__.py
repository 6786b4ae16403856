"""``python -m expertmesh.models``: the presets and what they cost, as a Markdown table."""

from expertmesh.models.presets import decoder_preset, decoder_presets


def preset_table(seq_len: int = 2048) -> str:
    """One row per preset; forward operations are counted at ``seq_len``, or at its longest."""
    rows = [
        "| preset | parameters | active | FLOPs per token | layers, of them MoE | experts |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in decoder_presets():
        config = decoder_preset(name)
        experts = _experts(config.num_experts, config.experts_per_token, config.num_shared_experts)
        flops = config.flops_per_token(min(seq_len, config.max_seq_len))
        rows.append(
            f"| `{name}` | {_short(config.num_params)} | {_short(config.num_active_params)} "
            f"| {_short(flops)} | {config.num_layers}, {config.num_moe_layers} "
            f"| {experts} |"
        )
    return "\n".join(rows)


def _short(number: int) -> str:
    """Three digits and a unit."""
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _experts(num_experts: int, chosen: int, shared: int) -> str:
    if num_experts == 0:
        return "none"
    return f"{chosen} of {num_experts}" + (f" + {shared}" if shared else "")


if __name__ == "__main__":
    print(preset_table())
