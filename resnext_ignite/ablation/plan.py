"""Reads the plan of an ablation: a YAML file that names a recipe, its variants and the seeds.

All configs are checked before the first run begins.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from resnext_ignite.config.batches import check_batch_size
from resnext_ignite.config.files import COMMAND_LINE, DOTTED_KEY, ConfigSource, one_line, read_source
from resnext_ignite.config.schema import Config
from resnext_ignite.runtime.errors import ConfigError

_KEYS = ("config", "overrides", "seeds", "baseline", "variants")
_LONGEST_NAME = 60


@dataclass(frozen=True)
class PlannedRun:
    """One run: the variant's name, the seed, the run folder relative to the ablation's folder, and the config."""

    variant: str
    seed: int
    folder: Path
    config: Config


@dataclass(frozen=True)
class Plan:
    """A valid plan: the name of its file, the variants, the seeds, and all runs in the order in which they train.

    First, all variants train with the first seed, then all variants with the second seed, and so on. If the ablation is
    interrupted, all variants can therefore be compared on the seeds that are done.
    """

    name: str
    variants: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]


@one_line()
def load_plan(path: Path, overrides: Iterable[str] = ()) -> Plan:
    """Read a plan and build the config of each variant.

    The values of a config come from four sources: the recipe, the plan's key `overrides`, the argument `overrides`, and
    the variant. If several sources set a key, the last of them counts.

    Args:
        overrides: `KEY=VALUE` config values for all variants, from the command line.

    Raises:
        ConfigError: the plan or a config is wrong; the message is one line, `PLAN:LINE: key: reason`.
    """
    reader = _Reader(path)
    base = reader.recipe()
    reader.lay(base, ("overrides",), reader.mapping("overrides"))
    given = list(overrides)
    if any(override.partition("=")[0] == "seed" for override in given):
        raise ConfigError(f"{COMMAND_LINE}: seed: the plan sets the seeds; leave it out")
    base.override(given)
    # Validate the values common to all variants first. Otherwise, an error in them could be reported as an error of the
    # first variant.
    base.config(str(path))
    seeds, variants = reader.seeds(), reader.variants()
    configs: dict[str, Config] = {}
    for name, values in variants.items():
        source = copy.deepcopy(base)
        reader.lay(source, ("variants", name), values)
        config = source.config(str(path))
        same = next((other for other, known in configs.items() if known == config), None)
        if same is not None:
            reader.refuse(("variants", name), f"has the same config as '{same}'; change a value or remove it")
        for key in ("train.max_hours", "evaluation.patience", "evaluation.target_error"):
            section, _, field = key.partition(".")
            if getattr(getattr(config, section), field):
                reader.refuse(("variants", name), f"{key} may end a run early, before its last epoch; leave it out")
        try:
            check_batch_size(config, world_size=1)
        except ConfigError as error:
            reader.refuse(("variants", name), str(error))
        configs[name] = config
    runs = tuple(
        PlannedRun(name, seed, Path(slug(name)) / f"seed_{seed}", config.model_copy(update={"seed": seed}))
        for seed in seeds
        for name, config in configs.items()
    )
    return Plan(path.stem, tuple(configs), reader.baseline(variants), seeds, runs)


def slug(name: str) -> str:
    """Return the folder name of a variant: lowercase letters, digits and hyphens, such as `no-mixup-0-2`."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


class _Reader:
    """Reads and checks the values of a plan's file one by one; errors name the line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = read_source(path, "PLAN")
        for key in self.source.values:
            if key not in _KEYS:
                guess = difflib.get_close_matches(key, _KEYS, n=1)
                self.refuse((key,), f"unknown key (did you mean '{guess[0]}'?)" if guess else "unknown key")

    def refuse(self, place: tuple[str, ...], reason: str) -> NoReturn:
        line = self.source.places.get(place, str(self.path))
        raise ConfigError(f"{line}: {'.'.join(place)}: {reason}")

    def recipe(self) -> ConfigSource:
        config = self.source.values.get("config")
        if not isinstance(config, str):
            self.refuse(("config",), f"{config!r}; a config file, relative to the plan's folder")
        return read_source(self.path.parent / Path(config).expanduser(), f"{self.path}: config")

    def mapping(self, key: str) -> dict[str, Any]:
        values = self.source.values.get(key)
        if values is None:
            return {}
        if not isinstance(values, dict):
            self.refuse((key,), f"{values!r}; keys with values")
        return values

    def lay(self, source: ConfigSource, place: tuple[str, ...], values: dict[str, Any]) -> None:
        for key, value in values.items():
            if key == "seed":
                self.refuse((*place, key), "the plan sets the seeds; leave it out")
            # Refuse a section as a key: `train: {epochs: 4}` would replace the whole section `train` of the recipe.
            if not DOTTED_KEY.fullmatch(key) or (isinstance(value, dict) and "." not in key):
                self.refuse((*place, key), "write a config key with its value, as train.epochs: 4")
            source.put(tuple(key.split(".")), value, self.source.places[(*place, key)])

    def seeds(self) -> tuple[int, ...]:
        seeds = self.source.values.get("seeds")
        if not isinstance(seeds, list) or not seeds:
            self.refuse(("seeds",), f"{seeds!r}; at least one seed, as [1, 2, 3]")
        for number, seed in enumerate(seeds):
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
                self.refuse(("seeds", str(number)), f"{seed!r}; an integer from 0 to {2**31 - 1}")
            if seed in seeds[:number]:
                self.refuse(("seeds", str(number)), f"{seed} is listed twice; remove one")
        return tuple(seeds)

    def variants(self) -> dict[str, dict[str, Any]]:
        variants = self.mapping("variants")
        if not variants:
            self.refuse(("variants",), "name at least one variant, as in 'baseline: {}'")
        folders: dict[str, str] = {}
        for name, values in variants.items():
            place = ("variants", name)
            folder = slug(name)
            if not folder or len(name) > _LONGEST_NAME:
                self.refuse(place, f"use letters and digits, at most {_LONGEST_NAME}: it names the run folders")
            if folder in folders:
                self.refuse(place, f"has the same run folder {folder} as '{folders[folder]}'; rename it")
            folders[folder] = name
            if values is not None and not isinstance(values, dict):
                self.refuse(place, f"{values!r}; keys with values, or {{}}")
        return {name: values or {} for name, values in variants.items()}

    def baseline(self, variants: dict[str, dict[str, Any]]) -> str:
        first = next(iter(variants))
        baseline = self.source.values.get("baseline", first)
        if baseline not in variants:
            self.refuse(("baseline",), f"{baseline!r} is not a variant; choose one of {', '.join(variants)}")
        return str(baseline)
