"""The rooms of the package: imports run downward from room to room, and never in a circle."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import tiny_arguments

import resnext_ignite

ROOT = Path(resnext_ignite.__file__).parent
COMMANDS = {
    "train",
    "evaluate",
    "predict",
    "report",
    "verify",
    "convert",
    "export",
    "pack",
    "imagenet",
    "summary",
    "ablate",
    "benchmark",
}
# Files of nothing but public names whose code is in a room; nothing in the package imports them.
ALIASES = {"checkpoint", "engines", "foreign"}
# From the top: a room may import from those on lower lines, and from no other. A room inside another has a line of its
# own where the rooms beside it have an order too.
LEVELS = [
    COMMANDS | ALIASES,
    {"ablation", "packing", "training"},
    {"weights", "plots"},
    {"weights.export"},
    {"weights.foreign"},
    {"runs"},
    {"models", "optim", "data"},
    {"data.reading"},
    {"data.augment", "data.sources"},
    {"distributed"},
    {"config"},
    {"runtime"},
]
# The one command that is made of another's runs, by `train.run`.
RUNS_ANOTHER = {("ablate", "train")}
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below the package; a room's `__init__` by the room's name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def imported(path: Path) -> set[str]:
    """Names of this package's modules that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resnext_ignite"):
            module = (node.module or "").removeprefix("resnext_ignite").lstrip(".")
            for alias in node.names:
                deeper = f"{module}.{alias.name}".lstrip(".")
                names.add(deeper if deeper in modules() else module)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("resnext_ignite.") for alias in node.names), path
    return names - {""}


def room_of(module: str) -> str:
    """The innermost room that a module is in; a command is a room by itself."""
    parts = module.split(".")
    rooms = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(room for room in rooms if room in LEVEL)


def test_every_module_is_in_a_room() -> None:
    assert {name.split(".")[0] for name in modules() if name} == {room for room in LEVEL if "." not in room}
    assert all(room in modules() for room in LEVEL)


def test_imports_run_downward() -> None:
    for name, path in modules().items():
        for target in imported(path) if name else ():
            own, other = room_of(name), room_of(target)
            if target == name.split(".")[0] and "." in name:
                raise AssertionError(f"{name} imports its own room's __init__")
            if f"{other}.".startswith(f"{own}.") or f"{own}.".startswith(f"{other}.") or (name, target) in RUNS_ANOTHER:
                # Inside a room any order is right that makes no circle.
                continue
            assert LEVEL[other] > LEVEL[own], f"{name} imports {target}"


def test_imports_make_no_circle() -> None:
    graph = {name: imported(path) - {name} for name, path in modules().items() if name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_constructors_and_handlers_take_plain_values() -> None:
    """Only build_* functions, attach_handlers and the commands see config objects."""
    for name, path in modules().items():
        if not name or name.split(".")[0] in COMMANDS or name.startswith(("config", "runs.folder")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__call__"):
                        annotations = [ast.unparse(a.annotation) for a in method.args.args if a.annotation]
                        assert "Config" not in annotations, f"{name}.{node.name}.{method.name} takes a config"


# A process that prints which modules are loaded: after the data's import, a run and an evaluation of it.
STAGES = """
import json, sys
def loaded(): return [name for name in sys.modules]
import resnext_ignite.data
after_import = loaded()
from resnext_ignite import evaluate, train
train.main(json.loads(sys.argv[1]))
after_training = loaded()
evaluate.main(["--checkpoint", sys.argv[2], "--json"])
print(json.dumps([after_import, after_training, loaded()]))
"""


def test_what_a_run_does_not_use_is_not_loaded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [json.dumps(tiny_arguments(run, "train.epochs=1")), str(run)]
    done = subprocess.run([sys.executable, "-c", STAGES, *arguments], capture_output=True, text=True, check=True)
    after_import, after_training, after_evaluation = map(set, json.loads(done.stdout.splitlines()[-1]))
    assert not after_import & {"yaml", "matplotlib", "resnext_ignite.config.files"}
    # TensorBoard is switched off in this run, and its protobuf with it.
    for modules_then in (after_training, after_evaluation):
        assert not modules_then & {"tensorboard", "google.protobuf"}
        assert not {name for name in modules_then if name.startswith("resnext_ignite.weights.foreign")}


def test_public_names_are_where_the_readme_says() -> None:
    from resnext_ignite import checkpoint, config, engines, foreign, models
    from resnext_ignite.config import files
    from resnext_ignite.runs.checkpoint import load_model
    from resnext_ignite.training.engines import create_evaluator, create_trainer
    from resnext_ignite.weights.loading import open_model

    assert checkpoint.load_model is load_model
    assert checkpoint.open_model is foreign.open_model is open_model
    assert (engines.create_trainer, engines.create_evaluator) == (create_trainer, create_evaluator)
    assert (config.load_config, config.save_config) == (files.load_config, files.save_config)
    assert callable(models.create_model)
    with pytest.raises(AttributeError, match="has no attribute 'load_cofnig'"):
        config.load_cofnig  # noqa: B018 - asking for it is the test


def test_no_file_is_too_long_and_none_is_called_utils() -> None:
    for path in modules().values():
        assert path.name != "utils.py"
        assert len(path.read_text().splitlines()) <= 450, path
