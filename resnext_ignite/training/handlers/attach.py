"""Attaches all handlers of a run to its trainer; their order is defined in this file alone."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events

from resnext_ignite.config.schema import Config
from resnext_ignite.data import Loaders
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.distributed.stopping import StopAgreement
from resnext_ignite.runs.folder import OpenRun
from resnext_ignite.training.engines import RunEvents
from resnext_ignite.training.handlers.averaging import build_fresh_statistics, build_lookahead
from resnext_ignite.training.handlers.checkpointing import RunState, SaveCheckpoints, Stateful
from resnext_ignite.training.handlers.evaluation import BestRecord, Evaluation, FinalTest
from resnext_ignite.training.handlers.files import EvaluationFile, MetricsFile, StatusFile
from resnext_ignite.training.handlers.log_point import LogPoint
from resnext_ignite.training.handlers.plots import Curves, MistakesPlot
from resnext_ignite.training.handlers.progress import Progress
from resnext_ignite.training.handlers.session import AttachedRun, EpochEnds, Parts


def attach_handlers(
    config: Config, parts: Parts, loaders: Loaders, run: OpenRun, ranks: Ranks, stop: StopAgreement
) -> AttachedRun:
    """Attach all handlers of a run, in the order in which they act on each event."""
    trainer, selection, abandon = parts.trainer, loaders.data.selection, dict(config.evaluation.abandon)

    def lr() -> float:
        return float(parts.optimizer.param_groups[0]["lr"])

    log_point = LogPoint(
        stop, parts.lr_scheduler.rate_at, config.logging.every_iterations, max_skipped=config.data.max_skipped
    )
    evaluation = Evaluation(
        parts.evaluator,
        loaders.evaluation[selection],
        selection,
        [parts.model] if parts.average is None else [parts.model, parts.average.ema_model],
        stop,
        every=config.evaluation.every,
        early=(*config.evaluation.early, *abandon),
        lr=lr,
        training=log_point.epoch_metrics,
        before=build_fresh_statistics(config, parts.average, loaders.train),
    )
    best = BestRecord(
        selection,
        stop,
        patience=config.evaluation.patience,
        min_delta=config.evaluation.min_delta,
        target_error=config.evaluation.target_error,
        abandon=abandon,
    )
    epoch_ends = EpochEnds(evaluation)
    handlers: dict[str, Stateful] = {
        "evaluation": evaluation,
        "epoch_ends": epoch_ends,
        "best": best,
        "log_point": log_point,
    }
    state = _run_state(config, parts, loaders, ranks, run, handlers, best)
    saver = SaveCheckpoints(
        state,
        run.folder.checkpoints,
        stop,
        best,
        every_epochs=config.checkpoint.every_epochs,
        every_iterations=config.checkpoint.every_iterations,
        keep=config.checkpoint.keep,
        unreadable=run.unreadable,
    )
    log_point.save_due = saver.due_inside_epoch

    # Set the learning rate before the update. After the update, apply Lookahead, then update the moving average of the
    # resulting weights. Then the log point raises an error if a number is not finite, so that no handler below can
    # write a result that is computed from it.
    parts.lr_scheduler.attach(trainer, Events.ITERATION_STARTED)
    lookahead = build_lookahead(config, parts.model)
    if lookahead is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lookahead)
        state.handlers["lookahead"] = lookahead
    if parts.average is not None:
        parts.average.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_STARTED, log_point.begin_epoch)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, log_point)
    # At RunEvents.EVALUATED, first update the best record and decide on a stop, so that the logs below can report both.
    trainer.add_event_handler(Events.STARTED, evaluation.before_training)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, evaluation)
    trainer.add_event_handler(RunEvents.EVALUATED, best)
    status = None
    if ranks.rank == 0:
        device = torch.cuda.get_device_name() if config.train.device == "cuda" else config.train.device
        metadata = {"changes_on_resume": run.changes, "device": device, "ranks": ranks.world_size}
        status = StatusFile(run.folder, best, metadata)
        _attach_writers(config, parts, loaders, run, status)

    # Save the checkpoint last, after every handler whose state it must contain, and write `best.pt` only after that.
    trainer.add_event_handler(Events.ITERATION_COMPLETED, saver.at_iteration)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, epoch_ends)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver.at_epoch_end)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver.save_best)
    trainer.add_event_handler(Events.COMPLETED, lambda engine: saver.save_as("final.pt"))
    if selection == "val" and "test" in loaders.evaluation:
        final_test = FinalTest(evaluation, parts.evaluated, loaders.evaluation["test"], saver.best_weights)
        trainer.add_event_handler(Events.COMPLETED, final_test)
    if ranks.rank == 0:
        _attach_plots(config, parts, loaders, run, saver, epoch_ends)
    return AttachedRun(parts, state, saver, evaluation, epoch_ends, best, stop, status, run)


def _run_state(
    config: Config,
    parts: Parts,
    loaders: Loaders,
    ranks: Ranks,
    run: OpenRun,
    handlers: dict[str, Stateful],
    best: BestRecord,
) -> RunState:
    data = loaders.data
    saved: dict[str, Stateful | None] = {
        "model": parts.model,
        "ema": None if parts.average is None else parts.average.ema_model,
        "optimizer": parts.optimizer,
        "lr_scheduler": parts.lr_scheduler,
        "scaler": parts.trainer.state.scaler,
    }
    metadata = {
        "config": config.model_dump(mode="json"),
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.evaluation_size,
        "selection": data.selection,
        "data": data.contents,
        "changes": run.changes,
    }

    def errors() -> dict[str, Any]:
        return {"last": getattr(parts.trainer.state, "record", None), "best": best.best}

    return RunState(parts.trainer, ranks, metadata, saved, handlers, errors)


def _attach_writers(config: Config, parts: Parts, loaders: Loaders, run: OpenRun, status: StatusFile) -> None:
    """Attach the handlers that write rank 0's reports: metrics, last evaluation, status and console output."""
    run.folder.start(config)
    if run.state is not None:
        status.last = run.state["errors"]["last"]
    parts.trainer.add_event_handler(Events.STARTED, status)
    parts.trainer.add_event_handler(RunEvents.EVALUATED, MetricsFile(run.folder))
    parts.trainer.add_event_handler(RunEvents.EVALUATED, EvaluationFile(run.folder, loaders.data.classes))
    parts.trainer.add_event_handler(RunEvents.EVALUATED, status)
    Progress(config.train.batch_size).attach(parts.trainer)


def _attach_plots(
    config: Config, parts: Parts, loaders: Loaders, run: OpenRun, saver: SaveCheckpoints, epoch_ends: EpochEnds
) -> None:
    """Attach rank 0's plots (TensorBoard, `curves.png`, `mistakes.png`) after the handlers whose results they show."""
    trainer, classes = parts.trainer, loaders.data.classes
    if config.logging.curves:
        curves = Curves(run.folder, run.folder.path.name)
        trainer.add_event_handler(RunEvents.EVALUATED, curves)
        trainer.add_event_handler(Events.COMPLETED, lambda engine: curves.draw())
    splits = {name: loader.split for name, loader in loaders.evaluation.items()}
    trainer.add_event_handler(Events.COMPLETED, MistakesPlot(run.folder, splits, classes))
    if not config.logging.tensorboard:
        return
    # Imported here, because a run without TensorBoard need not import it.
    from resnext_ignite.training.handlers.tensorboard import AugmentedSheet, MistakeSheets, TensorBoard

    new = run.state is None
    resumed = -1 if run.state is None else run.state["trainer"]["iteration"]
    pending = run.state is not None and epoch_ends.outstanding(run.state, config.train.epochs)
    # If the resumed run repeats the evaluation at the end of an epoch, the killed process may already have written the
    # result of this evaluation at the iteration of the checkpoint. Therefore, purge this iteration, too. The purge also
    # removes the training metrics of this iteration, which the resumed run does not compute again; `write_metrics`
    # restores them.
    board = TensorBoard(run.folder, resumed if pending else resumed + 1)
    board.attach(trainer, config, parts.model, loaders.data.selection, new=new)
    if run.state is not None and pending:
        board.write_metrics(run.state["handlers"]["log_point"]["last"], resumed)
    saver.before = board.flush
    if config.logging.images:
        if new:
            sheet = AugmentedSheet(board, loaders.train.augment, classes, config.logging.images)
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), sheet)
        sheets = MistakeSheets(board, splits, classes, config.logging.images)
        trainer.add_event_handler(RunEvents.EVALUATED, sheets)
        trainer.add_event_handler(Events.COMPLETED, sheets.draw)
    trainer.add_event_handler(Events.COMPLETED, lambda engine: board.close())

    def close_and_raise(engine: Engine, error: BaseException) -> None:
        # Write the pending points: the points before a failure help to explain it.
        board.close()
        raise error

    trainer.add_event_handler(Events.EXCEPTION_RAISED, close_and_raise)
