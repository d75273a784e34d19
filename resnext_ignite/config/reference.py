"""Builds the reference of all config keys (`docs/config.md`, `--help-config`) from the docstrings in the code."""

from __future__ import annotations

import json
from typing import Any

from resnext_ignite.config.schema import Config
from resnext_ignite.config.sections import Section


def config_reference() -> str:
    """Return the reference as Markdown: each key with its default, its meaning and its choices."""
    lines = [
        "# Config reference",
        "",
        "Written by `python -m resnext_ignite.train --help-config`. A file has only the keys it changes.",
    ]
    top = {name: field for name, field in Config.model_fields.items() if not _is_section(field.annotation)}
    sections = {name: field for name, field in Config.model_fields.items() if _is_section(field.annotation)}
    lines += ["", *_table("", top)]
    for name, field in sections.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        lines += ["", f"## {name}", "", _flat(section.__doc__), "", *_table(f"{name}.", section.model_fields)]
    return "\n".join(lines) + "\n"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _table(prefix: str, fields: dict[str, Any]) -> list[str]:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in fields.items():
        default = json.dumps(field.default if not isinstance(field.default, tuple) else list(field.default))
        choices = getattr(field.annotation, "__args__", ())
        words = [str(choice).lower() for choice in choices if isinstance(choice, str | bool)]
        meaning = _flat(field.description) + (f" One of: {', '.join(words)}." if words else "")
        rows.append(f"| `{prefix}{name}` | `{default}` | {meaning.replace('|', chr(92) + '|')} |")
    return rows


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())
