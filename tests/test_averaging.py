"""Lookahead, the average over a horizon and its BatchNorm statistics: by hand, on tiny networks, and in real runs."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Command, at_iteration, digest, tensors, train_tiny
from ignite.engine import Engine, Events
from test_train import killed_at
from test_world_sizes import assert_alike, run_logged, train_in_float64
from torch import Tensor, nn

from resnext_ignite import evaluate
from resnext_ignite.config.files import load_config
from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.data import Loaders, build_loaders
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.models import build_model
from resnext_ignite.runs.checkpoint import load_checkpoint, load_model
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import ConfigError, RunFolderError
from resnext_ignite.training.handlers.averaging import FreshStatistics, Lookahead, build_average

CPU = torch.device("cpu")


def weights_of(handler: Callable[[Engine], Any], model: nn.Linear, iterations: int, cut: int = 0) -> list[float]:
    """The weight after each iteration after `cut` of a training that adds 1 to it; epochs of 1 iteration."""
    seen: list[float] = []

    def add_one(engine: Engine, batch: int) -> None:
        with torch.no_grad():
            model.weight.add_(1.0)

    engine = Engine(add_one)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(model.weight.item()))
    if cut:
        engine.load_state_dict({"iteration": cut, "epoch_length": 1, "max_epochs": iterations})
    engine.run([0], max_epochs=iterations, epoch_length=1)
    return seen


def one_weight(value: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_slow_weights_by_hand() -> None:
    # From 0, two at a time, half the way: 1, 2 -> 0 + (2 - 0) / 2 = 1; 2, 3 -> 1 + (3 - 1) / 2 = 2; and so on.
    model = one_weight(0.0)
    assert weights_of(Lookahead(model, 2, 0.5), model, 6) == [1, 1, 2, 2, 3, 3]


def test_a_run_ends_on_its_slow_weights() -> None:
    # A fourth of the way: 3 -> 0.75, then 3.75 -> 1.5; the eighth and last would be 3.5.
    model = one_weight(0.0)
    assert weights_of(Lookahead(model, 3, 0.25), model, 8) == [1, 2, 0.75, 1.75, 2.75, 1.5, 2.5, 1.5]


def test_slow_weights_are_the_weights_at_the_start_and_go_on_after_a_cut() -> None:
    model = one_weight(8.0)
    first = Lookahead(model, 4, 0.5)
    assert first.state_dict()["slow"]["weight"].item() == 8
    assert weights_of(first, model, 6)[:4] == [9, 10, 11, 10]
    # Cut after the sixth of twelve, with 12 and slow weights of 10; the state is a copy of nothing else.
    model, saved = one_weight(12.0), {"slow": {"weight": torch.tensor([[10.0]])}}
    second = Lookahead(model, 4, 0.5)
    second.load_state_dict(saved)
    # 13, 14 -> 12; 13, 14, 15, 16 -> 14.
    assert weights_of(second, model, 12, cut=6) == [13, 12, 13, 14, 15, 14]
    assert saved["slow"]["weight"].item() == 10


def test_frozen_weights_have_no_slow_ones() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    assert Lookahead(model, 2, 0.5).state_dict()["slow"].keys() == {"1.weight", "1.bias"}


def average_config(**values: Any) -> Config:
    return with_values(Config(), {"train.epochs": 9, **{f"train.{key}": value for key, value in values.items()}})


def test_a_horizon_is_a_decay() -> None:
    # Two epochs of five iterations: the average remembers ten.
    average = build_average(average_config(ema_horizon=2, ema_start=1.5), one_weight(0.0), 5)
    assert average is not None
    assert average.momentum == pytest.approx(0.1)
    assert average.start == 8
    plain = build_average(average_config(ema_decay=0.9), one_weight(0.0), 5)
    assert plain is not None
    assert (plain.momentum, plain.start) == (pytest.approx(0.1), 0)
    assert build_average(average_config(), one_weight(0.0), 5) is None


def test_a_horizon_of_an_iteration_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.ema_horizon: 0.25 epochs are 1.25 iterations, .* at least 0.4$"):
        build_average(average_config(ema_horizon=0.25), one_weight(0.0), 5)


def test_the_average_is_the_weights_until_it_begins() -> None:
    # 0.1 + 1 is not a number of float32, so that only a copy is equal. From the third iteration on half the way.
    model = one_weight(0.1)
    average = build_average(average_config(ema_horizon=2, ema_start=2), model, 1)
    assert average is not None
    ours: list[float] = []

    def note(engine: Engine) -> None:
        average._update_ema_model(engine, "ema_momentum")
        ours.append(average.ema_model.weight.item())

    def attached(engine: Engine) -> None:
        engine.state.ema_momentum = average.momentum
        note(engine)

    theirs = weights_of(attached, model, 4)
    assert ours[:2] == theirs[:2]
    assert ours[2:] == pytest.approx([2.6, 3.35])


def tiny(values: dict[str, Any]) -> tuple[Config, Loaders]:
    config = load_config(ROOT / "configs/quickstart.yaml", TINY)
    config = with_values(config, {"model.num_classes": 10, "augment.mixup": 0.5, **values})
    return config, build_loaders(config, CPU, Ranks())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ghost", [0, 4])
def test_statistics_are_those_of_the_first_batches_of_the_epoch(accumulate: int, ghost: int) -> None:
    config, loaders = tiny({"train.accumulate": accumulate, "train.ghost_batch": ghost})
    torch.manual_seed(1)
    model = build_model(config).eval()
    kept = {name: value.clone() for name, value in model.named_parameters()}
    generator = torch.get_rng_state()
    engine = Engine(lambda engine, batch: None)
    engine.state.epoch = 2
    FreshStatistics(model, loaders.train, 3, torch.float32)(engine)
    # By hand, of what the first BatchNorm and the last see: 16 images an iteration, or twice 8; epochs of 4 iterations.
    config, others = tiny({"train.accumulate": accumulate})
    others.train.start_iteration = 4
    images = [part for batch in itertools.islice(others.train, 3) for part in batch.images.chunk(accumulate)]
    assert [len(part) for part in images] == [16 // accumulate] * 3 * accumulate
    with torch.no_grad():
        seen = [model.get_submodule("conv1")(part) for part in images]
    mean = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
    variance = torch.stack([part.var((0, 2, 3)) for part in seen]).mean(0)
    norm = model.get_submodule("bn1")
    torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, variance))
    assert norm.num_batches_tracked == 3 * accumulate
    # Nothing else has changed.
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, kept[name]) for name, value in model.named_parameters())
    assert loaders.train.start_iteration == 0
    assert torch.equal(torch.get_rng_state(), generator)


def test_statistics_do_not_depend_on_those_before() -> None:
    config, loaders = tiny({})
    model = build_model(config).eval()
    fresh = FreshStatistics(model, loaders.train, 2, torch.float32)
    engine = Engine(lambda engine, batch: None)
    states = []
    for number in (1.0, 7.0):
        for buffer in model.buffers():
            buffer.fill_(number)
        # Before the first epoch it is its batches, too.
        engine.state.epoch = int(number) // 7
        fresh(engine)
        states.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_no_more_than_the_epoch_that_was_trained_is_seen() -> None:
    config, loaders = tiny({"augment.progressive_from": 16})
    model = build_model(config)
    sizes = []
    model.register_forward_pre_hook(lambda module, images: sizes.append(images[0].shape[-1]))
    engine = Engine(lambda engine, batch: None)
    engine.state.epoch = 1
    FreshStatistics(model, loaders.train, 10, torch.float32)(engine)
    # Of its 4 iterations; those of the next epoch have larger images.
    assert sizes == [16] * 4


def test_frozen_statistics_stay() -> None:
    config, loaders = tiny({"train.freeze": "stem", "model.pretrained": "x"})
    model = build_model(config).eval()
    before = copy.deepcopy(model.state_dict())
    engine = Engine(lambda engine, batch: None)
    FreshStatistics(model, loaders.train, 1, torch.float32)(engine)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "layer1.0.bn1.running_mean" in changed
    assert not any(name.startswith("bn1.") for name in changed)


ALL = [
    "optimizer.name=muon",
    "train.ema_horizon=0.6",
    "train.ema_start=1",
    "train.ema_reestimate_bn=2",
    "train.lookahead=3",
    "train.ghost_batch=8",
    "checkpoint.every_iterations=1",
]


def state_of(folder: Path) -> tuple[dict[str, Any], list[bytes]]:
    slow = load_checkpoint(folder / "checkpoints/final.pt")["handlers"]["lookahead"]["slow"]
    return digest(folder), [tensor.numpy().tobytes() for tensor in tensors(slow)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged") / "run"
    assert train_tiny(folder, *ALL) == 0
    return folder


@pytest.mark.parametrize("cut", [5, 9, 12])
def test_a_run_killed_at_any_iteration_ends_the_same(
    cut: int, whole: Path, tmp_path: Path, in_fork: Callable[[Callable[[], Any]], int]
) -> None:
    # The fifth is the first of an epoch, right after an evaluation; the ninth a step of the slow weights, too.
    killed_at(tmp_path / "run", cut, in_fork, *ALL)
    assert train_tiny(tmp_path / "run", *ALL, resume=True) == 0
    assert state_of(tmp_path / "run") == state_of(whole)


def test_a_run_stopped_before_an_evaluation_makes_it(whole: Path, tmp_path: Path) -> None:
    def stop() -> None:
        at_iteration(4, lambda engine: os.kill(os.getpid(), signal.SIGTERM))

    assert Command(tmp_path / "run", *ALL, patch=stop).wait().code == 75
    assert len(RunFolder(tmp_path / "run").read_metrics()) == 1
    assert train_tiny(tmp_path / "run", *ALL, resume=True) == 0
    assert state_of(tmp_path / "run") == state_of(whole)


def test_what_is_evaluated_does_not_depend_on_when(whole: Path, tmp_path: Path) -> None:
    assert train_tiny(tmp_path / "run", *ALL, "evaluation.every=3", "evaluation.early=[]") == 0
    (once,), several = (RunFolder(folder).read_metrics() for folder in (tmp_path / "run", whole))
    assert [record["epoch"] for record in several] == [0, 1, 2, 3]
    for key in ("correct", "loss", "train_loss"):
        assert once[key] == several[-1][key]
    averages, models = (
        [load_checkpoint(f / "checkpoints/final.pt")[part] for f in (tmp_path / "run", whole)]
        for part in ("ema", "model")
    )
    for one, other in (averages, models):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_only_the_statistics_of_the_average_are_taken_anew(whole: Path, tmp_path: Path) -> None:
    # The training itself, and the average's weights, are those of a run that averages the statistics.
    assert train_tiny(tmp_path / "run", *ALL, "train.ema_reestimate_bn=0") == 0
    ours, theirs = (load_checkpoint(folder / "checkpoints/final.pt") for folder in (whole, tmp_path / "run"))
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    differing = {name for name, value in ours["ema"].items() if not torch.equal(value, theirs["ema"][name])}
    assert differing == {
        name for name in ours["ema"] if name.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_the_slow_weights_are_what_a_run_ends_on(whole: Path) -> None:
    # Twelve iterations, and slow steps at 3, 6, 9, 12.
    state = load_checkpoint(whole / "checkpoints/final.pt")
    slow = state["handlers"]["lookahead"]["slow"]
    assert all(torch.equal(slow[name], state["model"][name]) for name in slow)


def test_evaluating_repeats_the_figures_of_the_run(whole: Path, tmp_path: Path) -> None:
    metrics, _ = evaluate.evaluate(whole, "test", [])
    assert metrics["loss"] == RunFolder(whole).read_metrics()[-1]["loss"]
    # The best weights bring the statistics with which they were the best, at their own epoch.
    held = tmp_path / "held"
    assert train_tiny(held, *ALL, "data.val_size=20", "train.ema_horizon=1") == 0
    last = RunFolder(held).read_metrics()[-1]
    assert last["split"] == "test"
    metrics, _ = evaluate.evaluate(held, "test", [])
    assert metrics["loss"] == last["loss"]


def test_ranks_evaluate_one_average(tmp_path: Path) -> None:
    outcome = Command(tmp_path / "run", *ALL, "train.ghost_batch=0", ranks=2).wait()
    assert outcome.code == 0, outcome.stderr
    state = load_checkpoint(tmp_path / "run/checkpoints/final.pt")
    own = [statistics["ema"] for statistics in state["statistics"]]
    assert all(torch.equal(value, own[1][name]) for name, value in own[0].items())
    assert all(torch.equal(value, own[0][name]) for name, value in state["ema"].items() if "running" in name)
    # By hand: each iteration's two shares are eight images each, and the mean is over them all.
    model, _ = load_model(tmp_path / "run/checkpoints/final.pt")
    config = load_config(tmp_path / "run/config.yaml", [])
    seen: list[Tensor] = []
    for rank in range(2):
        loader = build_loaders(config, CPU, Ranks(rank, 2)).train
        loader.start_iteration = 8
        seen += [model.get_submodule("conv1")(batch.images) for batch in itertools.islice(loader, 2)]
    variance = torch.stack([part.var((0, 2, 3)) for part in seen]).mean(0)
    torch.testing.assert_close(state["ema"]["bn1.running_var"], variance.detach())


def test_pictures_are_read_by_workers_of_their_own(picture_folder: Path, tmp_path: Path) -> None:
    files = ["data.name=imagefolder", f"data.root={picture_folder}", "data.image_size=32", "train.epochs=1"]
    values = [*files, "data.train_size=null", "data.test_size=null", *ALL, "train.ema_start=0", "train.ema_horizon=1"]
    losses = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        assert train_tiny(folder, *values, f"data.workers={workers}") == 0
        losses.append([record["loss"] for record in RunFolder(folder).read_metrics()])
    assert losses[0] == losses[1]
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_ranks_train_as_one(tmp_path: Path) -> None:
    # In float64, each rank a ghost batch; statistics taken anew are of whole shares, which differ.
    values = [*ALL, "train.ema_reestimate_bn=0", "train.ema_horizon=1", "train.ghost_batch=8", "data.val_size=20"]
    for ranks in (1, 2):
        run_logged(tmp_path / str(ranks), *values, ranks=ranks, patch=train_in_float64)
    assert_alike(tmp_path / "1", tmp_path / "2", loss=1e-6, state=1e-10)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (["train.ema_decay=0.9", "train.ema_horizon=1"], "train.ema_horizon: and train.ema_decay exclude each other"),
        (["train.ema_start=1"], "train.ema_start: there is no average; set train.ema_horizon or train.ema_decay"),
        (["train.ema_reestimate_bn=5"], "train.ema_reestimate_bn: there is no average"),
        (["train.ema_horizon=1", "train.ema_start=3"], "train.ema_start: 3; less than the 3 of train.epochs"),
        (["train.ema_horizon=0"], "train.ema_horizon: input should be greater than 0, not 0"),
        (["train.lookahead_alpha=0"], "train.lookahead_alpha: input should be greater than 0, not 0"),
        (["optimizer.name=adam"], "optimizer.name: input should be 'sgd' or 'muon'"),
    ],
)
def test_what_cannot_be_is_refused(values: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs/quickstart.yaml", [*TINY, *values])
    assert line in str(caught.value)


def test_a_run_keeps_to_its_averages(whole: Path) -> None:
    with pytest.raises(RunFolderError, match=r"would change the run: train\.lookahead 3 -> 4"):
        train_tiny(whole, *ALL, "train.lookahead=4", resume=True)
