"""The house rule: imports run downward only, and never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import resnext_ignite

ROOT = Path(resnext_ignite.__file__).parent
# From the top: a module may import from its own level (but commands from each other never) and from those below.
LEVELS = [
    {
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
    },
    {"ablation", "exporting", "handlers", "packing", "report_page"},
    {"run_folder", "run_records", "pictures", "pretrained", "foreign"},
    {"checkpoint"},
    {"tuning"},
    {"engines"},
    {"models", "optim", "data", "metrics"},
    {"distributed"},
    {"config"},
    {"runtime"},
]
# The one command that is made of another's runs, by `train.run`.
RUNS_ANOTHER = {("ablate", "train")}
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """Names of this package's modules that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resnext_ignite"):
            module = (node.module or "").removeprefix("resnext_ignite").lstrip(".")
            whole = modules()
            for alias in node.names:
                deeper = f"{module}.{alias.name}".lstrip(".")
                names.add(deeper if deeper in whole else module)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("resnext_ignite.") for alias in node.names), path
    return names - {""}


def test_every_module_has_its_level() -> None:
    assert {name.split(".")[0] for name in modules() if name} == set(LEVEL)


def test_imports_run_downward() -> None:
    for name, path in modules().items():
        own = name.split(".")[0]
        for target in imported(path) if name else ():
            other = target.split(".")[0]
            if other == own:
                assert target != own or "." not in name, f"{name} imports its own folder's __init__"
            else:
                beside = LEVEL[other] == LEVEL[own] and (LEVEL[own] != 0 or (name, target) in RUNS_ANOTHER)
                assert LEVEL[other] > LEVEL[own] or beside, f"{name} imports {target}"


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
        if LEVEL.get(name.split(".")[0], 0) == 0 or name.startswith(("config", "run_folder")):
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
