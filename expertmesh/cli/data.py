"""``expertmesh data``: what can be fetched, and what is in it."""

import argparse

HELP = "list, fetch and look at data sets"
_OF_DATA = {
    "kind": "text or instructions",
    "tokenizer": "a name or a path",
    "seq_len": "tokens of a sample",
    "objective": "causal, ul2 or ul2-openmoe",
    "template": "plain or openmoe",
}


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
    elif args.command == "show":
        _show(args.name, tuple(args.fields))
    else:
        _preview(args)
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
        "--fields", nargs="+", default=(), help="keys or columns of records (default: text)"
    )
    preview = commands.add_parser("preview", help="samples as a run sees them: given, to learn")
    preview.add_argument("source", metavar="SOURCE", help="a run file, or a source as in [data]")
    preview.add_argument("--samples", type=int, default=3, help="how many (default: 3)")
    preview.add_argument("--seed", type=int, help="of the run (default: the run file's, or 0)")
    for name, what in _OF_DATA.items():
        preview.add_argument(f"--{name.replace('_', '-')}", help=f"data.{name}: {what}")
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
    from expertmesh.errors import UserError

    if name in CATALOG and fields:
        raise UserError(
            f"--fields is for files, folders and hf:NAME, got {' '.join(fields)} for {name}, "
            "which is read as the catalog says; leave it out"
        )
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


def _preview(args: argparse.Namespace) -> None:
    from expertmesh.data import build_data
    from expertmesh.data.preview import preview
    from expertmesh.errors import UserError
    from expertmesh.train.run_file import load_run_file, parse_run

    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, got {args.samples}")
    given = {name: getattr(args, name) for name in _OF_DATA if getattr(args, name) is not None}
    overrides = [f"--data.{name}={value}" for name, value in given.items()]
    if args.source.endswith(".toml"):
        run = load_run_file(args.source, overrides)
    else:
        run = parse_run({"model": {"preset": "nano"}, "data": {"source": args.source}}, overrides)
    bundle = build_data(run.data)
    seed = run.run.seed if args.seed is None else args.seed
    for line in preview(bundle.train, bundle.tokenizer, args.samples, seed):
        print(line)
