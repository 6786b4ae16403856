"""One HTML page of a run: no network, no script, everything inside."""

import base64
from html import escape

from expertmesh.metrics import DEAD_BELOW
from expertmesh.report import summary
from expertmesh.report.css import CSS
from expertmesh.report.figures import Picture
from expertmesh.report.read import LayerRouting, Run
from expertmesh.report.tokens import printable_lines, token_tables

_MOST_SAMPLE_CHARACTERS = 20_000

_SECTIONS = (
    ("learning", "Learning", ("loss", "optimizer", "throughput")),
    ("balance", "Balance of the experts", ("load", "load_over_time", "drops", "entropy")),
    ("specialisation", "What the routers look at", ("by_token",)),
)

_GLOSSARY = (
    (
        "Load / fair share",
        "Assignments that an expert was asked to take, divided by what it would be asked to take "
        "if all experts of the layer took equally many: 1.0 is fair. Assignments that then "
        "overflowed a capacity are counted.",
    ),
    (
        "Assignment",
        "One token given to one of the k experts that the router chose for it. Padding has none.",
    ),
    (
        "Max / fair, min / fair",
        "Load / fair share of the most and of the least loaded expert of a layer. The slowest "
        "device works about max / fair times as long as it would in perfect balance.",
    ),
    (
        "CV",
        "Coefficient of variation: the standard deviation of the experts' loads divided by their "
        "mean; 0 is perfect balance.",
    ),
    (
        "Dead expert",
        f"One with less than {DEAD_BELOW:g} of its fair share: it hardly learns.",
    ),
    (
        "Entropy",
        "Of the softmax of the router's logits, averaged over the tokens, in nats: ln E when all E "
        "experts are equally likely, 0 when one is certain.",
    ),
    (
        "Drop",
        "An assignment beyond the capacity of its expert, which therefore did nothing; the token "
        "goes on with its other experts, or with the residual connection alone.",
    ),
    (
        "First choice",
        "The expert that a router scores highest for a token, dropped or not. An id tells it where "
        "the other tokens of that id make the same one most often; ids that occur once are left "
        "out. Counted on the held-out text, at each evaluation.",
    ),
    (
        "Lift",
        "A token's share among what an expert takes, divided by its share among all tokens: 1 is "
        "no preference, 3 means that the expert takes it three times as often as average.",
    ),
    (
        "Perplexity, bits per byte",
        "The exponential of the loss in nats; and the loss in bits, for each byte of the text "
        "rather than for each token, which compares models with different tokenizers.",
    ),
)


def render(run: Run, pictures: list[Picture]) -> str:
    """The page as HTML text.

    Args:
        run: What ``read_run`` read.
        pictures: What ``figures.draw`` drew of it.
    """
    by_name = {picture.subject.name: picture for picture in pictures}
    sections = [
        ("numbers", "In numbers", _facts(run)),
        *(
            (anchor, title, _section(run, anchor, by_name, names))
            for anchor, title, names in _SECTIONS
        ),
        ("tokens", "Tokens of each expert", token_tables(run)),
        ("sample", "Generated text", _sample(run.samples)),
        ("configuration", "Configuration", _configuration(run.config_text)),
        ("glossary", "What the words mean", _glossary()),
    ]
    shown = [section for section in sections if section[2]]
    # A folder's name may hold bytes that no encoding has: they come as lone surrogates.
    title = escape(printable_lines(run.path.resolve().name))
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in shown[1:])
    body = "".join(
        f'<section id="{anchor}">{f"<h2>{name}</h2>" if anchor != "numbers" else ""}{content}'
        "</section>\n"
        for anchor, name, content in shown
    )
    notes = "".join(f'<p class="note">{escape(note)}.</p>' for note in run.notes)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{title} · expertmesh</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f'<header><h1>{title}</h1><p class="soft">A run of expertmesh, '
        f"up to step {run.last_step:,}.</p>\n<nav>{nav}</nav>{notes}</header>\n"
        f"<main>{body}</main>\n</body>\n</html>\n"
    )


def _facts(run: Run) -> str:
    tiles = "".join(
        f'<div><dt>{escape(fact.name)}</dt><dd class="value">{escape(fact.value)}</dd>'
        f'<dd class="remark">{escape(fact.remark)}</dd></div>'
        for fact in summary.headline(run)
    )
    return f'<dl class="facts">{tiles}</dl>'


def _section(run: Run, anchor: str, pictures: dict[str, Picture], names: tuple[str, ...]) -> str:
    if anchor == "balance" and not run.routing:
        return "<p>The run logged no routing: a dense model, or one that has not logged yet.</p>"
    parts = []
    for name in names:
        if name in pictures:
            parts.append(_figure(pictures[name]))
        elif name == "drops":
            parts.append(_no_drops(run))
        if name == "load":
            parts.append(_balance_table(run.routing))
    return "".join(parts)


def _figure(picture: Picture) -> str:
    subject = picture.subject
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f"<figure><h3>{escape(subject.title)}</h3>"
        f"<figcaption>{escape(subject.caption)}</figcaption>"
        f'<div class="scroll picture"><img alt="{escape(subject.title)}" '
        f'src="data:image/png;base64,{data}"></div></figure>\n'
    )


def _no_drops(run: Run) -> str:
    if summary.dropped_share(run) is None:
        return ""
    return f"<h3>Dropped assignments</h3><p>Up to step {run.last_step:,}, nothing was dropped.</p>"


def _balance_table(routing: tuple[LayerRouting, ...]) -> str:
    columns = ("experts", "max / fair", "min / fair", "CV", "dead experts", "entropy", "dropped")
    head = "".join(f'<th class="number">{column}</th>' for column in columns)
    rows = []
    for layer in map(summary.layer_balance, routing):
        cells = (
            f"{layer.num_experts}",
            f"{layer.max_over_fair:.2f}",
            f"{layer.min_over_fair:.2f}",
            f"{layer.cv:.3f}",
            f"{layer.num_dead}",
            f"{layer.entropy:.2f}",
            summary.percent(layer.dropped),
        )
        row = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td><code>{escape(layer.name)}</code></td>{row}</tr>")
    return (
        f'<p class="soft">The same in numbers, {routing[0].settled_steps}:</p>'
        f'<div class="scroll"><table class="balance"><thead><tr><th>layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sample(text: str) -> str:
    if not text.strip():
        return ""
    cut = (
        f'<p class="soft">The first {_MOST_SAMPLE_CHARACTERS:,} of {len(text):,} characters.</p>'
        if len(text) > _MOST_SAMPLE_CHARACTERS
        else ""
    )
    return f"<pre>{escape(printable_lines(text[:_MOST_SAMPLE_CHARACTERS]))}</pre>{cut}"


def _configuration(text: str) -> str:
    if not text:
        return ""
    return (
        "<details><summary>Everything the run was configured with, as resolved</summary>"
        f"<pre>{escape(printable_lines(text))}</pre></details>"
    )


def _glossary() -> str:
    entries = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in _GLOSSARY)
    return f'<dl class="glossary">{entries}</dl>'
