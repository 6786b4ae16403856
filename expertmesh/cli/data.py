"""``expertmesh data``: what can be fetched, and what is in it."""

import argparse

HELP = "list, fetch and look at data sets"


def main(argv: list[str]) -> int:
    """Run ``expertmesh data ARGV``.

    Args:
        argv: The words after ``data``.

    Returns:
        The exit status.

    Raises:
        UserError: For an unknown name, a source out of reach, a corrupt file.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
    elif args.command == "list":
        _list()
    elif args.command == "fetch":
        _fetch(args.names, again=args.again)
    else:
        _show(args.name, tuple(args.fields))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="expertmesh data", description=HELP.capitalize() + ".")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("list", help="the data sets and tokenizers that can be fetched by name")
    fetch = commands.add_parser("fetch", help="download into the cache; SHA-256 is checked")
    fetch.add_argument("names", nargs="+", metavar="NAME", help="a name that `list` shows")
    fetch.add_argument("--again", action="store_true", help="drop what is cached first")
    show = commands.add_parser("show", help="counts and the beginning of a data set or tokenizer")
    show.add_argument("name", metavar="NAME", help="a name, a file, a folder, or hf:NAME")
    show.add_argument(
        "--fields", nargs="+", default=["text"], help="keys or columns of records (default: text)"
    )
    return parser


def _list() -> None:
    from expertmesh.data.cache import cache_root
    from expertmesh.data.catalog import CATALOG
    from expertmesh.data.fetch import cached_source

    width = max(map(len, CATALOG))
    for entry in CATALOG.values():
        cached = ", cached" if cached_source(entry) else ""
        size = f"{entry.sources[0].size / 1e6:.1f} MB{cached}"
        print(f"{entry.name:{width}}  {entry.summary}")
        print(f"{'':{width}}  {size}; {entry.licence}")
        print(f"{'':{width}}  {', else '.join(source.where for source in entry.sources)}")
    print(f"\ncache: {cache_root()} (EXPERTMESH_CACHE sets it)")


def _fetch(names: list[str], *, again: bool) -> None:
    from expertmesh.data.catalog import find
    from expertmesh.data.fetch import fetch

    for name in names:
        # A misspelt last name should not cost the first one's download.
        find(name)
    for name in names:
        fetched = fetch(name, again=again)
        print(f"{name}: {len(fetched.files)} files of {fetched.source.where}")
        print(f"  licence: {fetched.entry.licence}")
        print(f"  {fetched.folder}")


def _show(name: str, fields: tuple[str, ...]) -> None:
    from expertmesh.data.catalog import CATALOG

    if name in CATALOG and CATALOG[name].kind == "tokenizer":
        _show_tokenizer(name)
    else:
        _show_text(name, fields)


def _show_text(name: str, fields: tuple[str, ...]) -> None:
    from expertmesh.data.text import read_corpus

    corpus = read_corpus(name, fields=fields)
    first, documents, characters, size = "", 0, 0, 0
    for text in corpus.documents():
        first = first or text[:400]
        documents += 1
        characters += len(text)
        size += len(text.encode("utf-8", errors="replace"))
    for key, value in corpus.provenance.items():
        print(f"{key}: {value}")
    print(f"documents: {documents:,}\ncharacters: {characters:,}\nbytes of text: {size:,}")
    print(f"\n{first}")


def _show_tokenizer(name: str) -> None:
    from expertmesh.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode("The experts share the work.")
    print(f"vocabulary: {tokenizer.vocab_size:,}\neos: {tokenizer.eos_id}\npad: {tokenizer.pad_id}")
    print(" ".join(f"{tokenizer.token_text(int(i))}({i})" for i in ids))
