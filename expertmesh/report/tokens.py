"""Which tokens each expert takes: a table for each layer, with every character made visible."""

import unicodedata
from html import escape

from expertmesh.report.read import LayerRouting, Run, TokenCount

# Above this many rows in all, only the first layer's table starts unfolded.
_MOST_OPEN_ROWS = 64

_SIGNS = {" ": "␣", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """A token with its invisible characters made visible.

    A space becomes an open box; control, format, private and lone surrogate characters are written
    as escapes, so that none of them can reorder or hide what is around it.
    """
    shown = []
    for character in text:
        category = unicodedata.category(character)
        if character in _SIGNS:
            shown.append(_SIGNS[character])
        elif category[0] == "C" or category in ("Zs", "Zl", "Zp"):
            shown.append(f"\\x{ord(character):02x}" if ord(character) < 256 else _escape(character))
        elif category[0] == "M" and not shown:
            shown.append("\N{DOTTED CIRCLE}" + character)
        else:
            shown.append(character)
    return "".join(shown)


def printable_lines(text: str) -> str:
    """A text of several lines, which keeps its spaces, tabs and line ends."""
    return "\n".join(
        "".join(character if character in " \t" else printable(character) for character in line)
        for line in text.splitlines()
    )


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def token_tables(run: Run) -> str:
    """A folded table for each layer: the tokens that mark each expert."""
    if not run.expert_tokens:
        return ""
    routing = {layer.name: layer for layer in run.routing}
    all_open = sum(map(len, run.expert_tokens.values())) <= _MOST_OPEN_ROWS
    parts = [
        '<p class="soft">The tokens that mark each expert in the final evaluation: it takes them '
        "often and more than its share. Behind each stands its lift; ␣ is a space, "
        "<code>\\n</code> a line end.</p>"
    ]
    for position, (name, experts) in enumerate(run.expert_tokens.items()):
        is_open = " open" if all_open or position == 0 else ""
        table = _token_table(experts, routing.get(name))
        parts.append(
            f"<details{is_open}><summary><code>{escape(printable(name))}</code></summary>"
            f'<div class="scroll">{table}</div></details>'
        )
    return "".join(parts)


def _token_table(experts: tuple[tuple[TokenCount, ...], ...], layer: LayerRouting | None) -> str:
    loads = layer.settled_E if layer is not None and layer.num_experts == len(experts) else None
    rows = []
    for expert, tokens in enumerate(experts):
        load = f'<td class="number">{loads[expert]:.2f}</td>' if loads is not None else ""
        chips = "".join(map(_chip, tokens)) or '<span class="soft">none</span>'
        rows.append(f'<tr><td class="number">{expert}</td>{load}<td>{chips}</td></tr>')
    load = '<th class="number">load / fair</th>' if loads is not None else ""
    return (
        f'<table class="tokens"><thead><tr><th class="number">expert</th>{load}'
        f"<th>tokens, with lift</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _chip(token: TokenCount) -> str:
    return (
        f'<span class="token" title="taken {token.count:,} times"><bdi><code>'
        f"{escape(printable(token.text))}</code></bdi><small>{token.lift:.1f}</small></span>"
    )
