"""Whatever a config file or an override says, it is read or refused: at once, in one line, before anything is written.

And a key with one typo is answered with the right key.
"""

from __future__ import annotations

import os
import random
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st

from resnext_ignite import train
from resnext_ignite.config.files import dump_config, load_config
from resnext_ignite.config.schema import Config, flatten
from resnext_ignite.runtime.errors import ConfigError, run_command

ROOT = Path(__file__).parent.parent
PRESETS = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
KEYS = list(flatten(Config()))
SECTIONS = [name for name in Config.model_fields if name not in KEYS]

# Values as they stand in a file.
VALUES = [
    # What another YAML, or another reader, takes for something else; and numbers without measure.
    *["", "~", "1e999", "-1e999", ".nan", "-.inf", "0x10", "0o17", "010", "08", "1_000", "12:30", "1.", "-0.0", "+1"],
    *["9" * 18, "9" * 19, "9" * 5000, "-" + "9" * 5000, "1e-400", "yes", "off", "y", "2001-01-01", "=", "<<"],
    # Lists and mappings, text that has no end, and tags.
    *["{}", "[[[[[[[[[]]]]]]]]]", "[" * 500, "{a: 1}", "{a: {b: {c: d}}}", "? a", "- 1", "a: b", "- - -", "1, " * 5000],
    *["'", '"', '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', '"\\e[31m"', '"a\\nb"', "|", ">-", "#", "@", "`", "%", "\t"],
    *["!!int 3", "!!binary aGk=", "!!python/object/apply:os.system [true]", "!x y", "&a 1", "*a", "&a [*a, *a]"],
    # Letters that are no letters.
    *["a\x85b", "a\u2028b", "a\rb", "\ufeff", "é😀", "\u202e\u200b\xa0", "\x1b[31m", "\0", "x" * 20_000],
    # What some key takes.
    *["true", "0", "1", "2", "5", "0.5", "1e-4", "[]", "[1, 2]", "[0.5, 0.5, 0.5]", "cosine", "cifar10", "null"],
]
# What may be pushed in anywhere.
SCRAPS = [
    *["\t", "\0", "\x1b", "\x85", "\u2028", "\r", "\ufeff", "\ud800", "\U0010ffff", "é😀", "x" * 2000, "\n", "\n\n  "],
    *["&a ", "*a", "<<: *a\n", "!!set ", "!", "---\n", "...\n", "%YAML 1.2\n---\n", "%TAG ! x\n", "train:\n", "|\n"],
    *["%YAML 1." + "9" * 5000 + "\n---\n", "[" * 200, "{a: " * 20, "- " * 20, "? ", ": ", ":", "'", '"', "]", "\\"],
]
RIGHT = ["train.epochs=3", "optimizer.lr=1e-3", "data.root='1.5e3'", "data.root=é😀", "evaluation.early=[]", "seed=7"]
NAMES = [*KEYS, *SECTIONS, *(key.rpartition(".")[2] for key in KEYS)]
ODD_NAMES = ["", " ", ".", "train.", "a\nb", "\x1b[31m", "\x85", "\ud800", "é", "~", "<<", "k" * 1000, "a.b" * 9]
names = st.sampled_from(NAMES) | st.sampled_from(ODD_NAMES) | st.text(max_size=8)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.text(max_size=8)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))


def push_in(draw: st.DrawFn, text: str) -> str:
    start = draw(st.integers(0, len(text)))
    end = draw(st.sampled_from([start, start, start + 1, start + 20]))
    return text[:start] + draw(st.sampled_from(SCRAPS) | st.text(max_size=4)) + text[end:]


def change_line(draw: st.DrawFn, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    number = draw(st.integers(0, len(lines) - 1))
    line = lines[number]
    key, colon, _ = line.partition(":")
    indent = key[: len(key) - len(key.lstrip())]
    lines[number] = draw(
        st.sampled_from(["", line * 2, " " + line, line.lstrip(), "\t" + line, lines[draw(st.integers(0, number))]])
        | st.sampled_from(VALUES).map(lambda value: f"{key}{colon} {value}\n")
        | names.map(lambda name: line.replace(key, indent + name))
    )
    return "".join(lines)


def change_newlines(draw: st.DrawFn, text: str) -> str:
    return text.replace("\n", draw(st.sampled_from(["\r\n", "\r", "\x85", "\u2028", "", "\n" * 20])))


@st.composite
def rearranged(draw: st.DrawFn) -> str:
    """A preset with a key renamed, moved, removed, or given another value, written anew."""
    config: dict[str, Any] = yaml.safe_load(draw(st.sampled_from(PRESETS)))
    section = config[draw(st.sampled_from(list(config)))]
    target = draw(st.sampled_from([config, *config.values()]))
    key = draw(st.sampled_from(list(section)))
    target[draw(st.sampled_from([key, key]) | names)] = draw(st.just(section.pop(key)) | trees)
    return yaml.safe_dump(config, allow_unicode=True, sort_keys=False)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A preset with a few things wrong, as bytes."""
    text = draw(st.sampled_from(PRESETS) | rearranged())
    mutations: list[Callable[[st.DrawFn, str], str]] = [push_in, change_line, change_line, change_newlines]
    for mutate in draw(st.just([]) | st.lists(st.sampled_from(mutations), max_size=3)):
        text = mutate(draw, text)
    encoding = draw(st.sampled_from(["utf-8"] * 20 + ["utf-8-sig", "utf-16", "latin-1"]))
    raw = bytearray(text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass"))
    for _ in range(draw(st.sampled_from([0] * 9 + [1, 3])) if raw else 0):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 127) | st.integers(0, 255))
    return bytes(raw)


assignments = st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)).map("=".join)
odd_assignments = st.tuples(names, st.sampled_from(VALUES) | st.text(max_size=6)).map("=".join)
deep_assignments = st.integers(1, 3000).map(lambda depth: ".".join(["a"] * depth) + "=1")
overrides = st.one_of(
    st.lists(st.sampled_from(RIGHT), max_size=2),
    st.lists(assignments, max_size=2),
    st.lists(odd_assignments | deep_assignments | st.text(max_size=8), max_size=1),
)


def quietly(max_examples: int) -> settings:
    """The same examples each time, and none kept on disk."""
    configuration.set_hypothesis_home_dir(os.devnull)
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def refusal(path: Path, lines: list[str]) -> str | None:
    """What a config is refused with; None where it is read."""
    begin = time.process_time()
    try:
        load_config(path, lines)
        return None
    except ConfigError as error:
        return str(error)
    finally:
        assert time.process_time() - begin < 2


def examine(max_examples: int, folder: Path) -> Counter[str]:
    """Read so many mutated configs; how many were accepted and refused."""
    tally: Counter[str] = Counter()
    path, copy = folder / "c.yaml", folder / "copy.yaml"

    @quietly(max_examples)
    @given(files(), overrides)
    def read(raw: bytes, lines: list[str]) -> None:
        path.write_bytes(raw)
        line = refusal(path, lines)
        tally["accepted" if line is None else "refused"] += 1
        if line is not None:
            assert line.isprintable()
            assert len(line) <= 400
            return
        config = load_config(path, lines)
        copy.write_text(dump_config(config), encoding="utf-8")
        assert load_config(copy) == config

    read()
    return tally


def test_mutated_configs_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    tally = examine(200, tmp_path)
    assert tally["accepted"] > 20, tally
    assert tally["refused"] > 100, tally


@pytest.mark.soak
def test_thousands_of_mutated_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = examine(5000, tmp_path)
    with capsys.disabled():
        sys.stdout.write(f"\nmutated configs: {tally['refused']} refused, {tally['accepted']} accepted ")
    assert tally.total() >= 5000


def test_the_command_refuses_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    monkeypatch.chdir(tmp_path)
    tried = 0

    @quietly(80)
    @given(files(), overrides)
    def command(raw: bytes, lines: list[str]) -> None:
        nonlocal tried
        path.write_bytes(raw)
        if any(line.startswith("-") for line in lines) or refusal(path, lines) is None:
            return
        tried += 1
        sys.argv = ["train", "--config", str(path), "--output-dir", str(tmp_path / "run"), *lines]
        with pytest.raises(SystemExit) as caught:
            run_command(train.main, prints_result=False)
        assert caught.value.code == ConfigError.exit_code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.removesuffix("\n").isprintable()
        assert os.listdir(tmp_path) == ["c.yaml"]

    monkeypatch.setattr(sys, "argv", sys.argv)
    command()
    assert tried > 24


@pytest.mark.parametrize(
    ("name", "raw", "lines"),
    [
        ("c.yaml", b"%YAML 1." + b"9" * 5000 + b"\n---\nseed: 1\n", []),
        ("a\n\x1b[31m.yaml", "\N{GREEK SMALL LETTER ALPHA}: 1\n".encode(), []),
        ("c.yaml", b"seed: 1\n", [".".join(["a"] * 20_000) + "=1"]),
        ("pipe", None, ["\udcff\n=1"]),
    ],
    ids=["yaml", "name", "override", "pipe"],
)
def test_the_real_command_ends_with_one_line(tmp_path: Path, name: str, raw: bytes | None, lines: list[str]) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    if raw is None:
        os.mkfifo(folder / name)
    else:
        (folder / name).write_bytes(raw)
    command = [sys.executable, "-m", "resnext_ignite.train", "--config", str(folder / name), "--output-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, *lines], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, b"")
    line = done.stderr.decode("ascii")
    assert line.startswith("error: ")
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert (os.listdir(tmp_path), os.listdir(folder)) == (["configs"], [name])


def typos(word: str, generator: random.Random) -> Iterator[tuple[str, str]]:
    """Every deletion and every swap of neighbours, and a sample of insertions and replacements: the kind, the word."""
    letters = string.ascii_lowercase + string.digits + "_"
    for place in range(len(word)):
        yield "deletion", word[:place] + word[place + 1 :]
        yield "swap", word[:place] + word[place : place + 2][::-1] + word[place + 2 :]
    for _ in range(4):
        place, letter = generator.randrange(len(word)), generator.choice(letters)
        yield "insertion", word[:place] + letter + word[place:]
        yield "replacement", word[:place] + letter + word[place + 1 :]


def test_a_key_with_one_typo_is_answered_with_the_right_key(tmp_path: Path) -> None:
    generator = random.Random(0)
    path, empty = tmp_path / "c.yaml", tmp_path / "empty.yaml"
    empty.touch()
    right: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    for key in (*KEYS, *SECTIONS):
        section, _, word = key.rpartition(".")
        valid = {known.rpartition(".")[2] for known in (*KEYS, *SECTIONS) if known.rpartition(".")[0] == section}
        for kind, typo in typos(word, generator):
            if typo in valid or not typo:
                continue
            inner = f"'{typo}': {{epochs: 3}}" if key in SECTIONS else f"'{typo}': 3"
            path.write_text(f"{section}:\n  {inner}\n" if section else f"{inner}\n")
            lines = {"file": refusal(path, [])}
            if not typo[0].isdigit():
                inner = f"{typo}.epochs=3" if key in SECTIONS else f"{typo}=3"
                lines["override"] = refusal(empty, [f"{section}.{inner}" if section else inner])
            for where, line in lines.items():
                group = f"{'section' if key in SECTIONS else 'key'} in {where}, {kind}"
                tried[group] += 1
                right[group] += f"(did you mean '{key}'?)" in str(line)
    shares = {group: right[group] / count for group, count in tried.items()}
    assert len(shares) == 16
    assert min(shares.values()) >= 0.95, shares
