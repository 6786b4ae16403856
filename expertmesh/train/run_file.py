"""From a TOML file and ``--section.key=value`` overrides to a checked ``RunFile``."""

import argparse
import difflib
import itertools
import json
import keyword
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from expertmesh.errors import UserError, nearest
from expertmesh.models.presets import decoder_preset
from expertmesh.train.config import NOTHING, RunFile, as_key

SECTIONS: dict[str, type] = get_type_hints(RunFile)
# What follows a table's name may be any text without "=": sources of a mixture have such names.
_FLAG = re.compile(r"--([A-Za-z_]\w*(?:\.\w+(?:\.[^=]+)?)?)(?:=(.*))?", re.DOTALL)
_WORDS = re.compile(r"\w+(?:\.\w+)*")
_KEY = re.compile(r'key "([\w.]+)"|argument --([\w.]+)|required: ([\w.]+)')


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read a run file.

    Args:
        path: TOML with the tables of ``RunFile``.
        overrides: ``--section.key=value``, or the value as the next word; they win over the file.

    Raises:
        UserError: For an unreadable file, an unknown key (with the nearest one that exists), a
            value of the wrong type, or one that its table refuses.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the run file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the run file {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    return parse_run(content, overrides, source=str(path))


def parse_run(
    content: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "the run file"
) -> RunFile:
    """Check what a run file holds, already read; see ``load_run_file``."""
    tables = _checked_tables(content, source)
    words = _checked_flags(overrides)
    preset, words = _take_preset(tables["model"], words)
    if preset is not None:
        router = _last_value(words, "model.router") or tables["model"].get("router")
        tables["model"] = _over_preset(_preset_values(preset), tables["model"], router)
    words = _with_none(tables, _merge_deep(tables, words))
    _drop_overridden(tables, words)
    _refuse_texts(tables)
    values = _typed(tables, words)
    return RunFile(**{name: _build(name, values[name]) for name in SECTIONS})


def _known(section: str) -> list[str]:
    names = [as_key(field.name) for field in fields(SECTIONS[section])]
    return ["preset", *names] if section == "model" else names


def _field(key: str) -> str:
    """The name in code of a key of the run file; see ``as_key``."""
    return f"{key}_" if keyword.iskeyword(key) else key


def _checked_tables(content: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for section, values in content.items():
        if section not in SECTIONS:
            hint = nearest(section, SECTIONS) or f"; the tables are {', '.join(SECTIONS)}"
            raise UserError(f"{source} has an unknown table [{section}]{hint}")
        if not isinstance(values, dict):
            raise UserError(f"{section} must be a table, got {values!r}; write [{section}]")
        for key in values:
            if key not in _known(section):
                raise UserError(f"{source} has an unknown key {section}.{key}{_hint(section, key)}")
        tables[section] = {_field(key): value for key, value in values.items()}
    return tables


def _checked_flags(overrides: Sequence[str]) -> list[str]:
    """Bring overrides into the form ``--section.key=value``, and refuse unknown ones."""
    words: list[str] = []
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        match = _FLAG.fullmatch(word)
        if match is None:
            raise UserError(f"unexpected argument {word!r}; overrides are --section.key=value")
        name, value = match[1], match[2]
        section, _, key = name.partition(".")
        if section in SECTIONS and not key:
            raise UserError(f"--{name} is a table; set a field of it, as in --{name}.FIELD=VALUE")
        field, _, inner = key.partition(".")
        if section not in SECTIONS or field not in _known(section):
            raise UserError(f"unknown option --{name}{_hint(section, key)}")
        if value is None:
            if not rest or _FLAG.fullmatch(rest[0]):
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            value = rest.pop(0)
        if inner:
            _check_entry(section, field, inner, value)
        if _is_table(section, field):
            value = _from_toml(value)
        words.append(f"--{section}.{_field(field)}{'.' if inner else ''}{inner}={value}")
    return words


def _is_table(section: str, field: str) -> bool:
    return get_origin(get_type_hints(SECTIONS[section]).get(field)) is dict


def _check_entry(section: str, field: str, inner: str, value: str) -> None:
    """Refuse what names no entry of a field: not a table, or a name that cannot be given so."""
    name = f"--{section}.{field}.{inner}"
    if not _is_table(section, field):
        raise UserError(f"unknown option {name}; {section}.{field} is no table")
    if get_args(get_type_hints(SECTIONS[section])[field])[1] is Any:
        if not _WORDS.fullmatch(inner):
            raise UserError(f"unexpected argument '{name}={value}'; its name must be plain words")
    elif "." in inner:
        # jsonargparse takes the dot for the border of a table within.
        raise UserError(
            f"{name}: a name with a dot cannot stand in an option; set it in the run file, or "
            f"write the whole table: --{section}.{field}='{{{json.dumps(inner)}: {value}}}'"
        )


def _from_toml(text: str) -> str:
    """A table in TOML's form as JSON, which jsonargparse reads; any other text as it is."""
    try:
        content = tomllib.loads(f"table = {text}")
    except tomllib.TOMLDecodeError:
        return text
    alone = content.keys() == {"table"} and isinstance(content["table"], dict)
    return json.dumps(content["table"], default=str) if alone else text


def _with_none(tables: dict[str, dict[str, Any]], words: list[str]) -> list[str]:
    """Take ``NOTHING`` for None wherever a field may be None, in the file and in overrides."""
    optional = {
        f"{section}.{field}"
        for section, kind in SECTIONS.items()
        for field, hint in get_type_hints(kind).items()
        if type(None) in get_args(hint)
    }
    for section, values in tables.items():
        for field, value in values.items():
            if value == NOTHING and f"{section}.{field}" in optional:
                values[field] = None
    said = {f"--{name}={NOTHING}": f"--{name}=null" for name in optional}
    return [said.get(word, word) for word in words]


def _drop_overridden(tables: dict[str, dict[str, Any]], words: list[str]) -> None:
    """Take out of the file what an override replaces whole: nobody asks any more what it was."""
    for word in words:
        name, _, value = word[2:].partition("=")
        section, _, field = name.partition(".")
        if isinstance(tables[section].get(field), dict):
            continue
        tables[section].pop(field, None)
        # jsonargparse wants to see a field without a default before it reads overrides.
        if field in _required(section):
            tables[section][field] = int(value) if value.isdecimal() else value


def _required(section: str) -> list[str]:
    return [
        field.name
        for field in fields(SECTIONS[section])
        if field.default is MISSING and field.default_factory is MISSING
    ]


def _refuse_texts(tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a text in a file where no text belongs: jsonargparse would read a number out of it."""
    for section, values in tables.items():
        hints = get_type_hints(SECTIONS[section])
        for field, value in values.items():
            hint, name = hints[field], f"{section}.{as_key(field)}"
            is_table = isinstance(value, dict) and get_origin(hint) is dict
            entries = value.values() if is_table else ()
            if (isinstance(value, str) and not _takes_text(hint)) or (
                any(isinstance(entry, str) for entry in entries)
                and not _takes_text(get_args(hint)[1])
            ):
                raise UserError(f"{name}: expected {_type_name(hint)}, got {value!r}")


def _takes_text(hint: Any) -> bool:
    """Whether a value of a type may be a text; of a list, whether its entries may."""
    if get_origin(hint) is Literal:
        return any(isinstance(arg, str) for arg in get_args(hint))
    if get_origin(hint) is dict:
        return False
    return hint in (str, Any) or any(map(_takes_text, get_args(hint)))


def _hint(section: str, key: str) -> str:
    """The nearest field: in the same table if one is close, else in any table, by its own name."""
    if section in SECTIONS and (close := difflib.get_close_matches(key, _known(section), n=1)):
        return f"; did you mean {section + '.' + close[0]!r}?"
    tables = {known: name for name in SECTIONS for known in _known(name)}
    if close := difflib.get_close_matches(key or section, tables, n=1):
        return f"; did you mean {tables[close[0]] + '.' + close[0]!r}?"
    return nearest(section, SECTIONS)


def _take_preset(model: dict[str, Any], words: list[str]) -> tuple[str | None, list[str]]:
    """Split the preset's name off: its values are the table's defaults, not a field."""
    preset = model.pop("preset", None)
    kept = []
    for word in words:
        if word.startswith("--model.preset="):
            preset = word.partition("=")[2]
        else:
            kept.append(word)
    if preset is not None and not isinstance(preset, str):
        raise UserError(f"model.preset: expected a string, got {preset!r}")
    return preset, kept


def _merge_deep(tables: dict[str, dict[str, Any]], words: list[str]) -> list[str]:
    """Put overrides of a table within a table of options in place: jsonargparse stops above them.

    ``--model.router_options.capacity.factor=2`` changes one entry and keeps its neighbours. Values
    are read as JSON where they are JSON, and are text otherwise.
    """
    kept = []
    names = {word[2:].partition("=")[0] for word in words}
    for word in words:
        name, _, value = word[2:].partition("=")
        section, *path, last = name.split(".")
        if len(path) < 2:
            kept.append(word)
            continue
        # What stays is read after this, and would take its place, whichever was said last.
        for above in itertools.accumulate([section, *path], "{}.{}".format):
            if above in names:
                raise UserError(f"--{above} and --{name} set the same table; give one of them")
        place = tables[section]
        for key in path:
            inner = place.get(key)
            place[key] = dict(inner) if isinstance(inner, dict) else {}
            place = place[key]
        try:
            place[last] = json.loads(value)
        except json.JSONDecodeError:
            place[last] = value
    return kept


def _preset_values(preset: str) -> dict[str, Any]:
    try:
        return asdict(decoder_preset(preset))
    except ValueError as error:
        raise UserError(f"model.preset: {error}") from None


def _last_value(words: list[str], name: str) -> str | None:
    """What the overrides set a field to, if they do."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return values[-1] if values else None


def _over_preset(preset: dict[str, Any], given: dict[str, Any], router: Any) -> dict[str, Any]:
    """A preset's values with those of the file over them.

    Options of the router go over the preset's one by one, unless the run has another router, to
    which they may mean nothing.
    """
    options = given.get("router_options", {})
    if router is not None and router != preset["router"]:
        preset = preset | {"router_options": {}}
    if isinstance(options, dict):
        given = given | {"router_options": preset["router_options"] | options}
    return preset | given


def _typed(tables: dict[str, dict[str, Any]], words: list[str]) -> Any:
    """Let jsonargparse convert and check every value against its field's type."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    try:
        return parser.parse_args(words, namespace=parser.parse_object(tables))
    except argparse.ArgumentError as error:
        raise UserError(_reworded(str(error), tables, words)) from None


def _reworded(message: str, tables: Mapping[str, Any], words: Sequence[str]) -> str:
    """Say a type error in the run file's terms: field, what was expected, what came."""
    match = _KEY.search(message)
    if match is None:
        return " ".join(message.split())
    name = match[1] or match[2] or match[3]
    section, _, key = name.partition(".")
    if match[3]:
        preset = "; or set model.preset" if section == "model" else ""
        return f"{name} has no default and was not given; set {name}{preset}"
    hint = get_type_hints(SECTIONS[section]).get(key.split(".")[0])
    got = tables[section].get(key)
    for word in words:
        if word.startswith(f"--{name}="):
            got = word.partition("=")[2]
        elif word.startswith(f"--{name}."):  # jsonargparse names the table of an entry
            got = word.removeprefix(f"--{name}.")
    return f"{as_key(name)}: expected {_type_name(hint)}, got {got!r}"


def _type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    if hint in names:
        return names[hint]
    if hint is type(None):
        return repr(NOTHING)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (list, tuple):
        return f"a list of values, each {_type_name(args[0])}"
    if origin is dict:
        return f"a table of values, each {_type_name(args[1])}"
    return "any value" if hint is Any else getattr(hint, "__name__", str(hint))


def _build(section: str, values: Any) -> Any:
    """Make the dataclass; what it refuses is said with the table's name before it."""
    arguments = dict(vars(values))
    if section == "model":
        options = arguments["router_options"]
        arguments["router_options"] = {k: None if v == NOTHING else v for k, v in options.items()}
    try:
        return SECTIONS[section](**arguments)
    except (ValueError, TypeError) as error:
        # A TypeError can come from free-form options only, which the parser cannot check.
        text = str(error)
        raise UserError(text if text.startswith(section) else f"[{section}] {text}") from None
