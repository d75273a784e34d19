"""Learning rates against values worked out by hand, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.models import create_model
from resnext_ignite.optim import build_lr_scheduler, build_optimizer, lr_factor
from resnext_ignite.optim.schedules import cosine, linear, multistep, warmup


@pytest.mark.parametrize(
    ("function", "iteration", "expected"),
    [
        # Five iterations of warm-up: a fifth more each, whole at the fifth.
        (lambda k: warmup(k, 5), 0, 0.2),
        (lambda k: warmup(k, 5), 3, 0.8),
        (lambda k: warmup(k, 5), 4, 1.0),
        (lambda k: warmup(k, 5), 99, 1.0),
        (lambda k: warmup(k, 0), 0, 1.0),
        # The drop holds from the milestone's own iteration on.
        (lambda k: multistep(k, [10, 20], 0.1), 9, 1.0),
        (lambda k: multistep(k, [10, 20], 0.1), 10, 0.1),
        (lambda k: multistep(k, [10, 20], 0.1), 20, 0.01),
        # Half way down: (1 + cos 90 deg) / 2; a third: (1 + cos 60 deg) / 2.
        (lambda k: cosine(k, 0, 12, 0.0), 0, 1.0),
        (lambda k: cosine(k, 0, 12, 0.0), 4, 0.75),
        (lambda k: cosine(k, 0, 12, 0.0), 6, 0.5),
        (lambda k: cosine(k, 0, 12, 0.2), 6, 0.6),
        (lambda k: cosine(k, 0, 12, 0.2), 12, 0.2),
        (lambda k: cosine(k, 4, 8, 0.0), 2, 1.0),
        (lambda k: linear(k, 2, 10, 0.0), 2, 1.0),
        (lambda k: linear(k, 2, 10, 0.0), 4, 0.75),
        (lambda k: linear(k, 2, 10, 0.5), 6, 0.75),
        (lambda k: linear(k, 2, 10, 0.0), 10, 0.0),
    ],
)
def test_factors_by_hand(function: Callable[[int], float], iteration: int, expected: float) -> None:
    assert function(iteration) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"name": "multistep", "milestones": [1, 2], "gamma": 0.5}, [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]),
        ({"name": "multistep", "milestones": [1], "warmup_epochs": 0.5}, [0.5, 1, 1, 1, 0.1]),
        ({"name": "constant", "warmup_epochs": 1}, [0.25, 0.5, 0.75, 1, 1, 1]),
        # Up over two epochs of four iterations, down over the third and last.
        ({"name": "triangular", "warmup_epochs": 2}, [k / 8 for k in range(1, 9)] + [1, 0.75, 0.5, 0.25]),
        ({"name": "cosine"}, [1, 0.9829629, 0.9330127, 0.8535534, 0.75, 0.6294095, 0.5]),
    ],
)
def test_schedules_of_configs(schedule: dict[str, object], factors: list[float]) -> None:
    config = with_values(Config(), {"train.epochs": 3, **{f"schedule.{key}": value for key, value in schedule.items()}})
    factor = lr_factor(config, iterations_per_epoch=4)
    assert [factor(k) for k in range(len(factors))] == pytest.approx(factors, abs=1e-6)


def rates(config: Config, start: int, end: int) -> list[float]:
    """The learning rates that iterations start+1 .. end of an engine really run with."""
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(config, model)
    seen: list[float] = []
    engine = Engine(lambda engine, batch: seen.append(optimizer.param_groups[0]["lr"]))
    build_lr_scheduler(config, optimizer, 4).attach(engine, Events.ITERATION_STARTED)
    if start:
        engine.load_state_dict({"iteration": start, "epoch_length": 4, "max_epochs": 3})
    engine.run(range(100), max_epochs=3, epoch_length=4)
    return seen[: end - start]


def test_every_iteration_has_its_rate_wherever_a_run_was_cut() -> None:
    config = with_values(Config(), {"train.epochs": 3, "schedule.name": "cosine", "optimizer.lr": 0.4})
    whole = rates(config, 0, 12)
    assert whole[0] == 0.4
    assert whole[6] == pytest.approx(0.2)
    for cut in (1, 4, 7, 11):
        assert rates(config, cut, 12) == whole[cut:]


def test_norms_and_biases_may_go_without_decay() -> None:
    model = create_model("cifar_resnext11_2x8d", 10, stem_channels=8)
    both = build_optimizer(Config(), model).param_groups
    assert [group["weight_decay"] for group in both] == [5e-4]
    groups = build_optimizer(with_values(Config(), {"optimizer.decay_norm_and_bias": False}), model).param_groups
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    bare = {id(p) for p in groups[1]["params"]}
    expected = {
        id(p) for name, p in model.named_parameters() if "bn" in name or "downsample.1" in name or "bias" in name
    }
    assert bare == expected
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_nesterov_sgd_by_hand() -> None:
    config = with_values(Config(), {"optimizer.lr": 0.1, "optimizer.momentum": 0.5, "optimizer.weight_decay": 0.0})
    weight = nn.Linear(1, 1, bias=False)
    nn.init.ones_(weight.weight)
    optimizer = build_optimizer(config, weight)
    for _ in range(2):
        weight.weight.grad = torch.ones(1, 1)
        optimizer.step()
    # v1 = 1, step 0.1 (1 + 0.5 * 1); v2 = 1.5, step 0.1 (1 + 0.5 * 1.5): 1 - 0.15 - 0.175.
    assert weight.weight.item() == pytest.approx(0.675)
