"""The two engines on a tiny network: updates by hand, exact counts, numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.nn import functional as F

from resnext_ignite.data.loaders import Batch
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.distributed.stopping import StopAgreement, StopReason
from resnext_ignite.models import create_model
from resnext_ignite.runtime.devices import resolve_precision
from resnext_ignite.runtime.errors import NonFiniteError
from resnext_ignite.training.engines import RunEvents, create_evaluator, create_trainer
from resnext_ignite.training.handlers.averaging import WeightAverage
from resnext_ignite.training.handlers.evaluation import BestRecord
from resnext_ignite.training.handlers.log_point import LogPoint

CPU = torch.device("cpu")


def batch(count: int, seed: int = 0, classes: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return Batch(images, torch.randint(classes, (count,), generator=generator), torch.arange(count))


def network(ghost_batch: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return create_model("cifar_resnext11_2x8d", 10, stem_channels=8, ghost_batch=ghost_batch)


def weights_after(batches: list[Batch], ghost_batch: int = 0, **options: object) -> list[torch.Tensor]:
    model = network(ghost_batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_trainer(model, optimizer, CPU, **options)  # type: ignore[arg-type]
    if trainer.state.scaler.is_enabled():
        # At the 65,536 that it begins with, a CPU that sums in fp16 overflows, and the first update is skipped.
        trainer.state.scaler.load_state_dict({**trainer.state.scaler.state_dict(), "scale": 1024.0})
    trainer.run(batches)
    return [parameter.detach() for parameter in model.parameters()]


def test_an_iteration_is_the_update_written_out() -> None:
    model, one = network(), batch(12)
    loss = F.cross_entropy(model(one.images), one.labels, label_smoothing=0.1)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = [p - 0.1 * g for p, g in zip(network().parameters(), gradients, strict=True)]
    for ours, theirs in zip(weights_after([one], label_smoothing=0.1), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_micro_batches_make_the_same_update() -> None:
    # With BatchNorm over ghost batches of a micro-batch's size, both see the same statistics.
    whole = weights_after([batch(12), batch(12, 1)], ghost_batch=4)
    parts = weights_after([batch(12), batch(12, 1)], ghost_batch=4, accumulate=3)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="12 images does not divide into 5"):
        weights_after([batch(12)], accumulate=5)


def test_a_first_update_that_fp16_skips_leaves_no_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fresh memory is full of what was there before: here of ones.
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(1))

    def momenta(scale: float) -> list[torch.Tensor]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
        trainer = create_trainer(model, optimizer, CPU, precision="fp16")
        trainer.state.scaler.load_state_dict({**trainer.state.scaler.state_dict(), "scale": scale})
        trainer.run([batch(12)])
        return [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]

    assert all(not momentum.any() for momentum in momenta(scale=2.0**40))
    # One that is not skipped gives the gradient itself, as SGD's own first update does.
    model, one = network(), batch(12)
    F.cross_entropy(model(one.images), one.labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    found = torch.cat([momentum.flatten() for momentum in momenta(scale=1024.0)])
    assert (found - gradient).norm() < 0.1 * gradient.norm()


def test_clipping_bounds_the_whole_gradient() -> None:
    before = [p.detach() for p in network().parameters()]
    after = weights_after([batch(12)], clip_grad_norm=0.01)
    step = torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)])
    assert step.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(("precision", "distance"), [("bf16", 0.25), ("fp16", 0.1)])
def test_lower_precision_stays_near(precision: str, distance: float) -> None:
    # Of the step itself; bf16 keeps 8 bits of each number, fp16 11.
    exact = torch.cat([w.flatten() for w in weights_after([batch(12)])])
    rough = torch.cat([w.flatten() for w in weights_after([batch(12)], precision=precision)])
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    moved = (exact - start).norm()
    assert 0 < (exact - rough).norm() / moved < distance


class Wired:
    """A trainer with a log point, as a run has it."""

    def __init__(self, every: int = 2, stop: StopAgreement | None = None) -> None:
        self.model = network()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.trainer = create_trainer(self.model, optimizer, CPU)
        self.stop = stop or StopAgreement(Ranks())
        self.point = LogPoint(self.stop, lambda iteration: 0.1 / iteration, every)
        self.trainer.add_event_handler(Events.EPOCH_STARTED, self.point.begin_epoch)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.point)
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.trainer.add_event_handler(
            RunEvents.METRICS_READY, lambda e: self.logged.append((e.state.iteration, dict(e.state.metrics)))
        )


def test_training_metrics_are_means_over_the_iterations_between_log_points() -> None:
    wired = Wired()
    batches = [batch(8, k) for k in range(5)]
    losses, correct = [], []
    reference = network()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for one in batches:
        logits = reference(one.images)
        loss = F.cross_entropy(logits, one.labels)
        losses.append(loss.item())
        correct.append((logits.argmax(1) == one.labels).sum().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wired.trainer.run(batches)
    # Every second iteration, and the epoch's end.
    assert [iteration for iteration, _ in wired.logged] == [2, 4, 5]
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [m["loss"] for _, m in wired.logged] == pytest.approx(means, rel=1e-5)
    assert wired.logged[0][1]["top1_error"] == pytest.approx(100 * (1 - sum(correct[:2]) / 16))
    assert wired.point.epoch_metrics()["train_loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_at_the_next_log_point_and_is_dated(where: str) -> None:
    wired = Wired(every=4)
    batches = [batch(8, k) for k in range(8)]
    if where == "loss":
        batches[1].images[3, 0, 0, 0] = math.nan
    else:
        weight = next(wired.model.parameters())
        calls: Iterator[int] = iter(range(100))
        weight.register_hook(lambda gradient: gradient * (math.inf if next(calls) == 1 else 1))
    with pytest.raises(NonFiniteError, match=r"iteration 2: .*learning rate 0\.05\)"):
        wired.trainer.run(batches)
    assert wired.trainer.state.iteration == 4
    assert wired.logged == []


def test_an_infinite_gradient_in_fp16_is_the_scalers_to_answer() -> None:
    model = network()
    trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), CPU, precision="fp16")
    before = [p.detach().clone() for p in model.parameters()]
    next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    trainer.run([batch(8)])
    *_, skipped, first_bad = trainer.state.sums.read_and_reset().tolist()
    assert (skipped, first_bad) == (1, math.inf)
    assert trainer.state.scaler.get_scale() == 2**15
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_single_rank_heeds_its_wish_to_stop_at_once() -> None:
    wired = Wired(every=3)
    wired.trainer.add_event_handler(
        Events.ITERATION_STARTED(once=2), lambda engine: wired.stop.request_stop(StopReason.TIME_LIMIT)
    )
    wired.trainer.run([batch(8, k) for k in range(8)])
    assert wired.trainer.state.iteration == 2
    assert wired.stop.reason == StopReason.TIME_LIMIT


def test_the_time_limit_is_a_wish() -> None:
    wired = Wired(every=1, stop=StopAgreement(Ranks(), max_hours=1e-9))
    wired.trainer.run([batch(8, k) for k in range(8)])
    assert wired.trainer.state.iteration == 1


def test_the_average_follows_its_formula() -> None:
    model = network()
    trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), CPU)
    average = WeightAverage(model, decay=0.75)
    expected = {key: value.clone() for key, value in model.state_dict().items()}

    def by_hand(engine: object) -> None:
        for key, value in model.state_dict().items():
            mixed = 0.75 * expected[key] + 0.25 * value if value.is_floating_point() else value
            expected[key] = mixed.clone()

    average.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, by_hand)
    trainer.run([batch(8, k) for k in range(3)])
    assert average.ema_model.get_buffer("bn1.num_batches_tracked") == 3
    for key, value in average.ema_model.state_dict().items():
        torch.testing.assert_close(value, expected[key])


class Table(nn.Module):
    """Looks its logits up: the first pixel of an image is its row."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


def test_evaluation_counts_by_hand() -> None:
    # Seven classes; rows: right; wrong with class 0 second; wrong with the label last.
    logits = torch.tensor([[9.0, 0, 1, 2, 3, 4, 5], [1.0, 2, 0, 0, 0, 0, 0], [0.0, 1, 2, 3, 4, 5, 6]])
    rows, labels = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 6])
    images = rows.float().view(4, 1, 1, 1).expand(4, 3, 2, 2)
    parts = [
        Batch(images[:3], labels[:3], torch.tensor([10, 11, 12])),
        Batch(images[3:], labels[3:], torch.tensor([13])),
    ]
    evaluator = create_evaluator(Table(logits), CPU, num_classes=7, keep_mistakes=2)
    metrics = evaluator.run(parts).metrics
    assert (metrics["images"], metrics["correct"], metrics["correct_top5"]) == (4, 1, 3)
    assert (metrics["top1_error"], metrics["top5_error"]) == (75.0, 25.0)
    losses = F.cross_entropy(logits[rows], labels, reduction="none")
    assert metrics["loss"] == pytest.approx(losses.mean().item())
    confusion = torch.zeros(7, 7, dtype=torch.int64)
    confusion[0, 0] = confusion[0, 1] = confusion[0, 6] = confusion[6, 0] = 1
    assert torch.equal(metrics["confusion"], confusion)
    assert [(m["index"], m["label"], m["predicted"]) for m in metrics["mistakes"]] == [(12, 0, 6), (13, 6, 0)]
    assert [m["loss"] for m in metrics["mistakes"]] == pytest.approx([losses[2].item(), losses[3].item()])


@pytest.mark.parametrize("count", [1, 7, 257])
def test_the_size_of_evaluation_batches_changes_no_count(count: int) -> None:
    model, all_images = network(), batch(count)
    results = []
    for size in (count, 64, 3):
        parts = [
            Batch(*parts)
            for parts in zip(
                *(x.split(size) for x in (all_images.images, all_images.labels, all_images.indices)), strict=True
            )
        ]
        results.append(create_evaluator(model, CPU, num_classes=10).run(parts).metrics)
    assert results[0]["images"] == count
    for result in results[1:]:
        assert torch.equal(result["confusion"], results[0]["confusion"])
        assert result["correct_top5"] == results[0]["correct_top5"]
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


def record(error: float, epoch: int, split: str = "test") -> dict[str, object]:
    return {"top1_error": error, "epoch": epoch, "split": split}


@pytest.mark.parametrize(
    ("errors", "patience", "min_delta", "target", "stops_at", "best"),
    [
        ([90, 50, 40, 41, 42], 2, 0.0, None, 4, 2),
        ([90, 50, 40, 40, 39], 2, 0.0, None, None, 4),
        # The evaluation before training is no first result: 10 would never be beaten.
        ([10, 50, 40, 30], 1, 0.0, None, None, 3),
        # Steps of less than min_delta are remembered as best, but do not renew the patience.
        ([90, 50, 49.5, 49.2], 2, 1.0, None, 3, 3),
        ([90, 50, 49, 48], 0, 0.0, 49.0, 2, 2),
        ([90, 50, 60, 70, 80], 0, 0.0, None, None, 1),
    ],
)
def test_best_patience_and_target(
    errors: list[float], patience: int, min_delta: float, target: float | None, stops_at: int | None, best: int
) -> None:
    stop = StopAgreement(Ranks())
    handler = BestRecord("test", stop, patience=patience, min_delta=min_delta, target_error=target)
    trainer = Wired().trainer
    stopped = None
    for epoch, error in enumerate(errors):
        trainer.state.record = record(error, epoch)
        handler(trainer)
        if stop.reason and stopped is None:
            stopped = epoch
            break
        trainer.state.record = record(0.0, epoch, "train")
        handler(trainer)
    assert stopped == stops_at
    assert handler.best is not None
    assert handler.best["epoch"] == best


def test_auto_precision_is_what_the_machine_has() -> None:
    assert resolve_precision("fp16", CPU) == "fp16"
    assert resolve_precision("auto", CPU) in ("fp32", "bf16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_an_iteration_does_not_wait_for_the_gpu() -> None:
    device = torch.device("cuda", 0)
    model = network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    trainer = create_trainer(model, optimizer, device, precision="bf16")
    moved = [Batch(*(x.to(device) for x in (b.images, b.labels, b.indices))) for b in (batch(8), batch(8, 1))]
    trainer.run(moved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.run(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
