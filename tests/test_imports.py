"""The rooms of the package: imports run downward from room to room, and never in a circle."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

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


def test_no_file_is_too_long_and_none_is_called_utils() -> None:
    for path in modules().values():
        assert path.name != "utils.py"
        assert len(path.read_text().splitlines()) <= 450, path
