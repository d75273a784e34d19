"""Reads configs from YAML files and from the command line, and writes them as YAML. Errors name the file and the line.

A config file uses a subset of YAML: it may not contain tags, anchors, aliases or duplicate keys. `1e-4` is read as a
number (PyYAML reads it as a string).
"""

from __future__ import annotations

import difflib
import errno
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resnext_ignite.config.schema import Config, Values, config_of, flatten
from resnext_ignite.runtime.errors import ConfigError
from resnext_ignite.runtime.storage import write_durably

COMMAND_LINE = "command line"
_LONGEST_TEXT = 100_000
# These errors mean that the path does not name a readable file; all other errors are storage errors. EIO can be a
# storage error too, but it is in this list because a wrong path can also cause it, for example /proc/self/mem.
_WRONG_NAME = {
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "ENAMETOOLONG", "ELOOP", "ENXIO", "EINVAL", "EIO")
}
_DEEPEST = 8
DOTTED_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,7}")
# No key or value needs these characters. In an error message they would break the line or control the terminal.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """Resolves scalars by the rules of YAML 1.2.

    PyYAML's own loaders use the rules of YAML 1.1: they read `1e-4` as a string, `010` as 8, `12:30` as 750, and `no`
    as false.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Writes a string in quotes if YAML 1.1 (PyYAML) or YAML 1.2 (`_Loader`) would otherwise read it as another type.

    For example, the string `1e-4` without quotes is a number in YAML 1.2.
    """


_SCALARS = {
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]{0,17})", list("-+0123456789")),
    "float": (r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+0123456789.")),
}
for _kind, (_pattern, _first_letters) in _SCALARS.items():
    for _reads in (_Loader, _Dumper):
        _reads.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern + r"\Z"), _first_letters)


class ConfigSource:
    """The nested values of a config. For each value, it records the place that sets the value.

    A place is a line of a file, or the command line.
    """

    def __init__(self) -> None:
        self.values: Values = {}
        self.places: dict[tuple[str, ...], str] = {}

    def read(self, text: str, place: str, path: tuple[str, ...] = (), *, lines: bool = True) -> None:
        """Parse a YAML string, and replace the value at `path` with the parsed value.

        Args:
            text: a string in the subset of YAML that config files use.
            place: the file or the command line, for error messages.
            path: the keys that lead to the value, outermost first; (): replace the whole config.
            lines: add the line number to the place of each value.

        Raises:
            ConfigError: the string is not in the subset, or is too long.
        """

        def where(mark: Any) -> str:
            return f"{place}:{mark.line + 1}" if lines else place

        if len(text) > _LONGEST_TEXT:
            raise ConfigError(f"{place}: longer than a config can be ({_LONGEST_TEXT} characters)")
        try:
            _refuse_extras(text, where)
            node = yaml.compose(text, Loader=_Loader)
            plain = None if node is None else self._plain(node, where, path)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise ConfigError(f"{where(mark) if mark else place}: not YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{place}: not YAML: {' '.join(str(error).split())}") from None
        except (ValueError, OverflowError):
            # `%YAML 1.999...` and `"\UFFFFFFFF"` cause these errors, and PyYAML does not catch them.
            raise ConfigError(f"{place}: not YAML: a version or a \\U escape with too large a number") from None
        if not path:
            if plain is not None and not isinstance(plain, dict):
                raise ConfigError(f"{place}: a config is a mapping of keys to values, not {_shown(plain)}")
            self.values = plain or {}
            return
        self.put(path, plain, place)

    def put(self, path: tuple[str, ...], value: Any, place: str) -> None:
        """Replace the value at `path`, and record the place that sets the new value."""
        target: Any = self.values
        for part in path[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[path[-1]] = value
        self.places[path] = place

    def override(self, overrides: Iterable[str]) -> None:
        """Apply `KEY=VALUE` overrides in order; if a key is given twice, the later value replaces the earlier one.

        Raises:
            ConfigError: an override is not `KEY=VALUE`, or its value is not in the subset of YAML.
        """
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not DOTTED_KEY.fullmatch(key):
                raise ConfigError(f"{COMMAND_LINE}: '{override}' is not KEY=VALUE, as in train.epochs=5")
            self.read(value, COMMAND_LINE, tuple(key.split(".")), lines=False)

    def config(self, fallback: str) -> Config:
        """Return the validated config.

        Args:
            fallback: the place that an error message names for a value without a recorded place.

        Raises:
            ConfigError: a value is not valid, or the config would be too long for a file.
        """
        try:
            config = config_of(self.values)
        except ValidationError as error:
            raise ConfigError(_first_line(error, self.places, fallback)) from None
        # A run stores its config with all keys. The stored file is longer than the user's file, but must also be short
        # enough to be read again.
        if len(dump_config(config)) > _LONGEST_TEXT:
            raise ConfigError(f"{fallback}: longer than a config can be ({_LONGEST_TEXT} characters)")
        return config

    def _plain(self, node: yaml.Node, where: Any, path: tuple[str, ...]) -> Any:
        if path:
            self.places[path] = where(node.start_mark)
        if isinstance(node, yaml.MappingNode):
            mapping = {}
            for key_node, value_node in node.value:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ConfigError(f"{where(key_node.start_mark)}: a key is a word, not a list or a mapping")
                key = str(key_node.value)
                if key in mapping:
                    dotted = ".".join((*path, key))
                    raise ConfigError(f"{where(key_node.start_mark)}: {dotted}: duplicate key")
                mapping[key] = self._plain(value_node, where, (*path, key))
                self.places[(*path, key)] = where(key_node.start_mark)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, where, (*path, str(i))) for i, item in enumerate(node.value)]
        kind, text = node.tag.rsplit(":", 1)[-1], str(node.value)
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
        if kind == "bool":
            return text.lower() == "true"
        return None if kind == "null" else text


def _refuse_extras(text: str, where: Any) -> None:
    # Check the parser's events before any node is built: otherwise nested aliases or deep nesting could exhaust the
    # memory.
    depth = 0
    documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{where(event.start_mark)}: anchors and aliases are not allowed; write the value out")
        tag, value = getattr(event, "tag", None), getattr(event, "value", "")
        if tag:
            raise ConfigError(f"{where(event.start_mark)}: YAML tags are not allowed ({tag}); write a plain value")
        if _UNFIT.search(value):
            raise ConfigError(f"{where(event.start_mark)}: a line break or control character in {_shown(value)}")
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or documents > 1:
            reason = "nested too deep" if depth > _DEEPEST else "a second document; a config is a single document"
            raise ConfigError(f"{where(event.start_mark)}: {reason}")


@contextmanager
def one_line() -> Iterator[None]:
    """Shorten any ConfigError raised in the `with` block to one printable line of at most 400 characters."""
    # The message holds paths, keys and values that the user chose. They must not break the line, make it very long, or
    # send control characters to the terminal.
    try:
        yield
    except ConfigError as error:
        line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(error))
        error.args = (line if len(line) <= 400 else f"{line[:200]} ... {line[-195:]}",)
        raise


@one_line()
def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a config file, and apply `KEY=VALUE` overrides in order.

    If a key is given twice, the later value replaces the earlier one.

    Args:
        path: the file; None: start from the defaults.
        overrides: for example "train.epochs=5".

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong. The message is one line,
            `FILE:LINE: key: reason (did you mean 'x'?)`.
    """
    source = ConfigSource() if path is None else read_source(path)
    source.override(overrides)
    return source.config(str(path or COMMAND_LINE))


@one_line()
def override_config(config: Config, overrides: Iterable[str]) -> Config:
    """Return a copy of a config with `KEY=VALUE` overrides applied; raise errors as `load_config` does."""
    source = ConfigSource()
    source.values = config.model_dump(mode="json")
    source.override(overrides)
    return source.config(COMMAND_LINE)


def read_source(path: str | Path, option: str = "--config") -> ConfigSource:
    """Read a YAML file, and record the line of each value.

    Args:
        path: the file.
        option: the command-line option that names the file, for error messages.

    Raises:
        ConfigError: the file cannot be read, or is not in the subset of YAML that config files use.
    """
    source = ConfigSource()
    source.read(_read_text(Path(path), option), str(path))
    return source


def _read_text(path: Path, option: str) -> str:
    try:
        # Reading a pipe may block for ever. A device such as /dev/zero has no end: limit the number of characters.
        if path.is_fifo():
            raise ConfigError(f"{path}: is a pipe; {option} takes a YAML file, as in configs/")
        with path.open(encoding="utf-8") as file:
            return file.read(_LONGEST_TEXT + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _WRONG_NAME:
            error.filename = str(path)
            raise
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}; {option} takes a YAML file, as in configs/") from None


def _first_line(error: ValidationError, places: dict[tuple[str, ...], str], fallback: str) -> str:
    """Return a one-line description of the first error: `place: key: reason`."""
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    # If a check involves several keys, pydantic does not report a key. The messages of these checks begin with a key
    # instead.
    named = re.match(r"([a-z_]+\.[a-z_0-9]+): ", message)
    if named is not None:
        parts, message = named[1].split("."), message[named.end() :]
    dotted = ".".join(parts)
    # Quote an unusual key: without quotes, an empty or blank key would be invisible.
    key = dotted if re.fullmatch(r"[\w.]*\w", dotted) else _shown(dotted)
    prefixes = (tuple(parts[:length]) for length in range(len(parts), 0, -1))
    place = next((places[prefix] for prefix in prefixes if prefix in places), fallback)
    if first["type"] == "extra_forbidden":
        if len(parts) == 1 and dotted in flatten(Config()):
            section, _, last = dotted.partition(".")
            return f"{place}: {key}: in a file, write '{last}' beneath the section '{section}:'"
        guess = _closest(dotted)
        return f"{place}: {key}: unknown key" + (f" (did you mean '{guess}'?)" if guess else "")
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{place}: {key}: a section of keys, not {_shown(first['input'])}"
    if named is None and first["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]}, not {_shown(first['input'])}"
    return f"{place}: {key}: {message}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _closest(dotted: str) -> str | None:
    head, _, word = dotted.lower().rpartition(".")
    section = (difflib.get_close_matches(head, ["", *Config.model_fields], n=1) or [head])[0]
    keys = [*Config.model_fields, *flatten(Config())]
    here = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    anywhere = {key.rpartition(".")[2]: key for key in reversed(keys)}
    # In a key as short as `lr`, one wrong letter halves the similarity. For short keys, accept a lower similarity.
    near = 0.6 if len(word) > 2 else 0.5
    for known, cutoff in ((here, 1.0), (anywhere, 1.0), (here, near), (anywhere, 0.75)):
        found = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
        if found:
            return known[found[0]]
    return None


def dump_config(config: Config) -> str:
    """Return the config as YAML, with every key, in the order of definition."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def save_config(config: Config, path: str | Path) -> None:
    """Write the config as YAML, with every key. The write is atomic.

    Raises:
        OSError: the file cannot be written.
    """
    write_durably(Path(path), dump_config(config))
