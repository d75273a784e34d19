"""Configs as files and command lines: read with the line of every key, written, compared.

The YAML read here is a plain subset: no tags, no aliases, no duplicate keys, and `1e-4` is a number.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resnext_ignite.config import Config, Values, config_of, flatten, with_values
from resnext_ignite.errors import ConfigError

COMMAND_LINE = "command line"
_LARGEST_FILE = 1_000_000
_DEEPEST = 8

# A run may be continued with other values of these: none changes what an iteration computes from its state.
SAFE_ON_RESUME = (
    "train.epochs",
    "train.max_hours",
    "data.root",
    "data.download",
    "data.workers",
    "evaluation.every",
    "evaluation.early",
    "checkpoint.every_epochs",
    "checkpoint.every_iterations",
    "checkpoint.keep",
    "logging.every_iterations",
    "logging.tensorboard",
    "logging.images",
    "logging.histograms",
)
# Left open (null, auto), these are settled by the machine or the data at the first start, and kept from then on.
_SETTLED = (
    "model.num_classes",
    "data.image_size",
    "data.mean",
    "data.std",
    "train.device",
    "train.precision",
    "train.deterministic",
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: PyYAML's own (1.1) read `1e-4` as a string, `010` as 8, `12:30` as 750, `no` as false."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_SCALARS = {
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]{0,17})", list("-+0123456789")),
    "float": (r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+0123456789.")),
}
for _kind, (_pattern, _first_letters) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern + r"\Z"), _first_letters)


class _Source:
    """Values by dotted path, each with the place (file and line, or the command line) that says it."""

    def __init__(self) -> None:
        self.values: Values = {}
        self.places: dict[str, str] = {}

    def read(self, text: str, place: str, path: tuple[str, ...] = (), *, lines: bool = True) -> None:
        """Add what a YAML text says at `path`, over what was there."""

        def where(mark: Any) -> str:
            return f"{place}:{mark.line + 1}" if lines else place

        try:
            _refuse_extras(text, where)
            node = yaml.compose(text, Loader=_Loader)
            plain = None if node is None else self._plain(node, where, path)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise ConfigError(f"{where(mark) if mark else place}: not YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{place}: not YAML: {' '.join(str(error).split())}") from None
        if not path:
            if plain is not None and not isinstance(plain, dict):
                raise ConfigError(f"{place}: a config is keys with values, not {_shown(plain)}")
            self.values = plain or {}
            return
        target: Any = self.values
        for part in path[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[path[-1]] = plain
        self.places.setdefault(".".join(path), place)
        self.places[".".join(path)] = place

    def _plain(self, node: yaml.Node, where: Any, path: tuple[str, ...]) -> Any:
        if path:
            self.places[".".join(path)] = where(node.start_mark)
        if isinstance(node, yaml.MappingNode):
            mapping = {}
            for key_node, value_node in node.value:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ConfigError(f"{where(key_node.start_mark)}: a key is a word, not a list or a mapping")
                key = str(key_node.value)
                dotted = ".".join((*path, key))
                if key in mapping:
                    raise ConfigError(f"{where(key_node.start_mark)}: {dotted}: the key stands here a second time")
                mapping[key] = self._plain(value_node, where, (*path, key))
                self.places[dotted] = where(key_node.start_mark)
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
    # On events, which are read one by one: aliases that multiply and nesting without end never get built.
    depth = 0
    documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{where(event.start_mark)}: anchors and aliases are not read; write the value out")
        tag = getattr(event, "tag", None)
        if tag:
            raise ConfigError(f"{where(event.start_mark)}: YAML tags are not read ({tag}); write a plain value")
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or documents > 1:
            reason = "nested too deep" if depth > _DEEPEST else "a second document; a config is one"
            raise ConfigError(f"{where(event.start_mark)}: {reason}")


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a config file and lay `KEY=VALUE` overrides over it; of two for one key the last wins.

    Raises:
        ConfigError: one line, `FILE:LINE: key: reason (did you mean 'x'?)`.
    """
    source = _Source()
    if path is not None:
        source.read(_read_text(Path(path)), str(path))
    return _with_overrides(source, overrides, str(path or COMMAND_LINE))


def override_config(config: Config, overrides: Iterable[str]) -> Config:
    """Lay `KEY=VALUE` overrides over a config; raises as `load_config`."""
    source = _Source()
    source.values = config.model_dump(mode="json")
    return _with_overrides(source, overrides, COMMAND_LINE)


def _with_overrides(source: _Source, overrides: Iterable[str], fallback: str) -> Config:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)*", key):
            raise ConfigError(f"{COMMAND_LINE}: '{override}' is not KEY=VALUE, as in train.epochs=5")
        source.read(value, COMMAND_LINE, tuple(key.split(".")), lines=False)
    try:
        return config_of(source.values)
    except ValidationError as error:
        raise ConfigError(_first_line(error, source.places, fallback)) from None


def _read_text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path}: larger than a config can be ({path.stat().st_size} bytes)")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}; --config takes a YAML file, as in configs/") from None


def _first_line(error: ValidationError, places: dict[str, str], fallback: str) -> str:
    """One line for the first thing that is wrong, in the order in which it stands."""
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    # A check over several keys names its key at the head of its message.
    named = re.match(r"([a-z_]+\.[a-z_0-9]+): ", message)
    if named is not None:
        parts, message = named[1].split("."), message[named.end() :]
    dotted = ".".join(parts)
    place = next((places[p] for p in _prefixes(parts) if p in places), fallback)
    if first["type"] == "extra_forbidden":
        if len(parts) == 1 and dotted in flatten(Config()):
            section, _, key = dotted.partition(".")
            return f"{place}: {dotted}: in a file, write '{key}' beneath the section '{section}:'"
        guess = _closest(dotted)
        return f"{place}: {dotted}: unknown key" + (f" (did you mean '{guess}'?)" if guess else "")
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{place}: {dotted}: a section of keys, not {_shown(first['input'])}"
    if named is None and first["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]}, not {_shown(first['input'])}"
    return f"{place}: {dotted}: {message}"


def _prefixes(parts: list[str]) -> Iterator[str]:
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _closest(dotted: str) -> str | None:
    keys = [*flatten(Config()), *Config.model_fields]
    by_last: dict[str, list[str]] = {}
    for key in keys:
        by_last.setdefault(key.rsplit(".", 1)[-1], []).append(key)
    section, _, last = dotted.rpartition(".")
    # First within the section, then the whole path, then the last word alone, wherever it lives.
    here = [key for key in keys if key.rpartition(".")[0] == section]
    for word, known in ((dotted, here), (dotted, keys), (last, list(by_last))):
        found = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
        if found:
            return by_last[found[0]][0] if known is not here and found[0] in by_last else found[0]
    return None


def dump_config(config: Config) -> str:
    """The config as YAML, every key in the order of its definition."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def adopt_resolved(config: Config, saved: Config) -> Config:
    """`config`, with what it leaves to the machine or the data taken from a run that settled it already."""
    now = flatten(config)
    before = flatten(saved)
    return with_values(config, {key: before[key] for key in _SETTLED if now[key] in (None, "auto")})


def changed_values(config: Config, saved: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with the saved and the new value."""
    before, after = flatten(saved), flatten(config)
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def check_shares(config: Config, world_size: int) -> None:
    """Whether so many ranks can share each batch evenly.

    Raises:
        ConfigError: with the nearest sizes that they can.
    """
    train = config.train
    share, rest = divmod(train.batch_size, world_size * train.accumulate)
    if rest:
        unit = world_size * train.accumulate
        fits = [size for size in (train.batch_size // unit * unit, (train.batch_size // unit + 1) * unit) if size]
        raise ConfigError(
            f"train.batch_size: {train.batch_size} cannot be shared by {world_size} ranks of {train.accumulate} "
            f"micro-batches; {' or '.join(map(str, fits))} can"
        )
    if train.ghost_batch and share % train.ghost_batch:
        raise ConfigError(
            f"train.ghost_batch: {train.ghost_batch} does not divide a rank's micro-batch of {share} images"
        )
