"""The config: what it accepts, what it says of what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from resnext_ignite.config.files import (
    dump_config,
    load_config,
)
from resnext_ignite.config.reference import config_reference
from resnext_ignite.config.resume import adopt_resolved, changed_values
from resnext_ignite.config.schema import Config, flatten, with_values
from resnext_ignite.runtime.errors import ConfigError

ROOT = Path(__file__).parent.parent


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) <= 400
    return line


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == Config()
    assert load_config(None) == Config()


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "optimizer: {lr: 1e-2, weight_decay: 5E-4, momentum: 0}\n"), ["optimizer.nesterov=false"]
    )
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.momentum) == (0.01, 5e-4, 0.0)


def test_the_last_override_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  epochs: 3\n")
    config = load_config(path, ["train.epochs=4", "schedule.milestones=[1, 2]", "train.epochs=5", "data.root=~/x y"])
    assert config.train.epochs == 5
    assert config.schedule.milestones == (1, 2)
    assert config.data.root == "~/x y"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  epocs: 3\n", ":2: train.epocs: unknown key (did you mean 'train.epochs'?)"),
        ("lr: 3\n", ":1: lr: unknown key (did you mean 'optimizer.lr'?)"),
        ("zzz: 3\n", ":1: zzz: unknown key"),
        ("train.epochs: 3\n", ":1: train.epochs: in a file, write 'epochs' beneath the section 'train:'"),
        ("seed: 1\ntrain:\n  epochs: true\n", ":3: train.epochs: input should be a valid integer, not true"),
        ("train: {epochs: '3'}\n", ':1: train.epochs: input should be a valid integer, not "3"'),
        ("train: {epochs: 0}\n", ":1: train.epochs: input should be greater than or equal to 1, not 0"),
        ("train: 3\n", ":1: train: a section of keys, not 3"),
        ("train:\n", ":1: train: a section of keys, not null"),
        ("optimizer: {lr: .inf}\n", ':1: optimizer.lr: input should be a valid number, not ".inf"'),
        ("optimizer: {lr: 1e999}\n", ":1: optimizer.lr: input should be a finite number, not Infinity"),
        ("seed: 1\nseed: 2\n", ":2: seed: duplicate key"),
        ("seed: !!python/name:os.system\n", ":1: YAML tags are not allowed (tag:yaml.org,2002:python/name:os.system)"),
        ("seed: &a 1\n", ":1: anchors and aliases are not allowed"),
        ("seed: *a\n", ":1: anchors and aliases are not allowed"),
        ("seed: [\n", ":2: not YAML"),
        ("seed: 1\n---\nseed: 2\n", ":2: a second document"),
        ("- 1\n", ": a config is a mapping of keys to values, not [1]"),
        ("[1]: 2\n", ":1: a key is a word"),
        ("schedule:\n  milestones: [3, 2]\n", ":2: schedule.milestones: [3, 2] must ascend"),
        ("train:\n  batch_size: 10\n  ghost_batch: 4\n", ":3: train.ghost_batch: 4 does not divide the micro-batch"),
        ("model:\n  name: resnet50\n", ":2: model.name: 'resnet50' is not a model name"),
        ("model: {name: cifar_resnext11_2x8d, stem_channels: 4}\n", ":1: model.stem_channels: 4 leaves the groups"),
        ("data: {mean: [0, 0]}\n", ":1: data.mean.2: field required"),
        ("data: {mean: [0, 0, 0]}\n", ":1: data.mean: give data.mean and data.std together"),
        ("seed: " + "[" * 500 + "]" * 500, ":1: nested too deep"),
        ("checkpoint: {keep: 1}\n", ":1: checkpoint.keep: input should be greater than or equal to 2, not 1"),
        ("seed: " + "9" * 5000, ":1: seed: input should be a valid integer, not Infinity"),
        ('"": 1\n', ':1: "": unknown key'),
        ('train: {" ": 1}\n', ':1: "train. ": unknown key'),
        ("train.epochs: 1\ntrain: {epochs: 2}\n", ":1: train.epochs: in a file, write 'epochs' beneath"),
        ('"a\\nb\\e[31m": 1\n', ':1: a line break or control character in "a\\nb\\u001b[31m"'),
        ('data: {root: "a\\0b"}\n', ':1: a line break or control character in "a\\u0000b"'),
        ('data: {root: "\\ud800"}\n', ':1: a line break or control character in "\\ud800"'),
        ("data:\n  root: |\n    a\n", ':2: a line break or control character in "a\\n"'),
        ('data: {root: "a\u2028b"}\n', ':1: a line break or control character in "a\\u2028b"'),
        ('data: {root: "\\UFFFFFFFF"}\n', ": not YAML: a version or a \\U escape with too large a number"),
        ("%YAML 1." + "9" * 5000 + "\n---\nseed: 1\n", ": not YAML: a version or a \\U escape with too large a number"),
        ("seed: 1\0\n", ": not YAML: unacceptable character #x0000"),
        ("seed: 1\rtrain: {epocs: 3}\r", ":2: train.epocs: unknown key (did you mean 'train.epochs'?)"),
        ("seed: 1\x85train: {epocs: 3}\x85", ":2: train.epocs: unknown key (did you mean 'train.epochs'?)"),
        ("seed: !" + "x" * 5000, ":1: YAML tags are not allowed (!xxx"),
        ("model: {name: " + "x" * 5000 + "}\n", ":1: model.name: 'xxx"),
        ("schedule: {milestones: [" + "1, " * 500 + "]}\n", ":1: schedule.milestones: [1, 1, "),
        ("? " + "k" * 5000 + "\n: 1\n", ":1: kkk"),
        ("#" * 100_001, ": longer than a config can be (100000 characters)"),
        # Short enough itself, but not as the file that a run keeps.
        ("evaluation: {early: [" + "1," * 20_000 + "]}\n", ": longer than a config can be (100000 characters)"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    path = write(tmp_path, text)
    assert refusal(path).startswith(f"{path}{line}")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.epochs", "command line: 'train.epochs' is not KEY=VALUE"),
        ("train.epochs=", "command line: train.epochs: input should be a valid integer, not null"),
        ("optimizer.lr=[1", "command line: not YAML"),
        ("seed.x=1", "command line: seed: input should be a valid integer"),
        ("train.batchsize=1", "command line: train.batchsize: unknown key (did you mean 'train.batch_size'?)"),
        ("a\nb=1", "command line: 'a\\nb=1' is not KEY=VALUE"),
        ("\udcff=1", "command line: '\\udcff=1' is not KEY=VALUE"),
        ("data.root=\udcff", "command line: not YAML: unacceptable character #xdcff"),
        ("data.name=\x1b[31m", "command line: not YAML: unacceptable character #x001b"),
        ('data.name="\\e[31m"', 'command line: a line break or control character in "\\u001b[31m"'),
        ("x" * 5000, "command line: 'xxx"),
        (".".join(["a"] * 20_000) + "=1", "command line: 'a.a.a."),
        ("seed=" + "1" * 100_001, "command line: longer than a config can be (100000 characters)"),
    ],
)
def test_a_wrong_override_names_the_command_line(override: str, line: str) -> None:
    assert refusal(None, override).startswith(line)


@pytest.mark.parametrize(
    ("key", "right"),
    [
        # A key of another section, the start or the end of a key, capitals.
        ("train.lr", "optimizer.lr"),
        ("data.batch_size", "train.batch_size"),
        ("trian.batch_size", "train.batch_size"),
        ("evalution.batch_size", "evaluation.batch_size"),
        ("train.batch", "train.batch_size"),
        ("schedule.warmup", "schedule.warmup_epochs"),
        ("train.smoothing", "train.label_smoothing"),
        ("LR", "optimizer.lr"),
        ("optimizer.rl", "optimizer.lr"),
        ("optim", "optimizer"),
        # The section alone makes nothing alike.
        *((key, None) for key in ("evaluation.foo", "checkpoint.dir", "optimizer.beta", "logging.level", "train.x")),
        *((key, None) for key in ("data.persistent", "schedule.t_max", "model.dropout", "debug", "zzz", "_", "a.b.c")),
    ],
)
def test_a_wrong_key_is_answered_with_a_near_one_or_none(tmp_path: Path, key: str, right: str | None) -> None:
    guess = f" (did you mean '{right}'?)" if right else ""
    assert refusal(write(tmp_path, f"{key}: 1\n")).endswith(f":1: {key}: unknown key{guess}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.yaml")
    assert "Is a directory" in refusal(tmp_path)
    assert "Not a directory" in refusal(write(tmp_path, "seed: 1\n") / "c.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    assert "not UTF-8" in refusal(tmp_path / "binary.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "Too many levels" in refusal(tmp_path / "loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is a pipe" in refusal(tmp_path / "pipe.yaml")
    assert "longer than a config" in refusal(Path("/dev/zero"))
    assert "Input/output error" in refusal(Path("/proc/self/mem"))
    assert "a\\n\\x1b[31m\\udcff.yaml: No such file" in refusal(tmp_path / "a\n\x1b[31m\udcff.yaml")
    assert "File name too long; --config takes a YAML file" in refusal(tmp_path / ("x" * 5000))
    if os.geteuid() != 0:
        write(tmp_path, "seed: 1\n").chmod(0)
        assert "Permission denied" in refusal(tmp_path / "c.yaml")


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = load_config(
        None, ["schedule.milestones=[150, 225]", "optimizer.lr=1e-5", "data.mean=[0, 0.5, 1]", "data.std=[1, 1, 1]"]
    )
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "root",
    ["1e-4", "1.5e3", ".5", "1" * 20, "010", "no", "~", "", "12:30", "2001-01-01", "<<", "=", " a: #b' ", "é😀\xa0"],
)
def test_a_text_that_looks_like_something_else_survives_too(tmp_path: Path, root: str) -> None:
    config = with_values(Config(), {"data.root": root})
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().train.epochs = 3  # type: ignore[misc]


def test_with_values_checks_what_it_sets() -> None:
    assert with_values(Config(), {"train.precision": "bf16", "evaluation.early": [0, 2]}).evaluation.early == (0, 2)
    with pytest.raises(ValidationError):
        with_values(Config(), {"train.precision": "fp8"})


def test_what_was_resolved_is_adopted_and_changes_are_listed() -> None:
    saved = with_values(Config(), {"train.precision": "bf16", "model.num_classes": 10})
    again = with_values(Config(), {"train.epochs": 20})
    adopted = adopt_resolved(again, saved)
    assert adopted.train.precision == "bf16"
    assert changed_values(adopted, saved) == {"train.epochs": (10, 20)}
    # A null that a user may mean is not taken for an open question.
    limited = with_values(saved, {"data.train_size": 50})
    assert changed_values(adopt_resolved(saved, limited), limited) == {"data.train_size": (50, None)}


def test_the_reference_on_disk_is_the_codes_own() -> None:
    assert (ROOT / "docs/config.md").read_text() == config_reference()
    for key in flatten(Config()):
        assert f"`{key}`" in config_reference()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_loads(path: Path) -> None:
    assert load_config(path) != Config()
