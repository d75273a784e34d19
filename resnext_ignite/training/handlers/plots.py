"""Draws the plots of a run on rank 0: `curves.png` and `mistakes.png`."""

from __future__ import annotations

import time

from ignite.engine import Engine

from resnext_ignite.data.loaders import Split
from resnext_ignite.plots.figures import draw_curves, draw_mistakes, name_of_evaluation, save_figure
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.storage import warn_on_failure


class Curves:
    """Draws `curves.png` after evaluations, at most once every `seconds` seconds; call `draw` at the end."""

    def __init__(self, folder: RunFolder, name: str, seconds: float = 30) -> None:
        self.folder, self.name, self.seconds = folder, name, seconds
        self._last = time.monotonic()

    def __call__(self, engine: Engine) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self.draw()

    def draw(self) -> None:
        """Draw `curves.png` now."""
        with warn_on_failure("curves.png"):
            save_figure(draw_curves({self.name: self.folder.read_metrics()}), self.folder.curves)
        self._last = time.monotonic()


class MistakesPlot:
    """Draws `mistakes.png`, the worst mistakes of the run's last evaluation; attach it to COMPLETED.

    Args:
        splits: the evaluated splits, by name.
    """

    def __init__(self, folder: RunFolder, splits: dict[str, Split], classes: tuple[str, ...]) -> None:
        self.folder, self.splits, self.classes = folder, splits, classes

    def __call__(self, engine: Engine) -> None:
        record, result = getattr(engine.state, "record", None), getattr(engine.state, "evaluation", None)
        if record is None or result is None:
            return
        with warn_on_failure("mistakes.png"):
            if result["mistakes"]:
                sheet = draw_mistakes(result["mistakes"], self.splits[record["split"]], self.classes)
                save_figure(sheet, self.folder.mistakes, name_of_evaluation(record))
            else:
                self.folder.mistakes.unlink(missing_ok=True)
