"""Draws the results of a benchmark: bars for each suite, and curves for the growth of time and memory."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from resnext_ignite.plots.figures import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Suites that are drawn as bars, with their titles. The suite `growth` is drawn as lines; other suites are not drawn.
_BARS = {
    "data": "input, CIFAR images",
    "train": "training",
    "eval": "evaluation",
    "photographs": "from JPEG files",
    "folders": "listing a folder of images",
    "export": "exported",
}
_OWN_COLOR, _PEER_COLOR = "tab:blue", "0.65"


def draw_benchmark(results: dict[str, Any]) -> Figure:
    """Draw the results of all suites: a row of bars for each suite, and a row of curves for `growth`.

    The length of a bar is the median of a contender, and the error bar is the range of its samples. The bars of this
    project are blue.
    """
    found = results["suites"]
    bars = [name for name in found if name.partition(":")[0] in _BARS]
    tables = found.get("growth", {}).get("tables", {})
    heights = [0.32 * len(found[name]["samples"]) + 0.7 for name in bars] + [3.0] * bool(tables) or [0.1]
    figure = pyplot().figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    machine = results["machine"]
    figure.suptitle(f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['date']}", fontsize=9)
    for row, name in zip(rows, bars, strict=False):
        _draw_bars(row.subplots(), found[name], _BARS[name.partition(":")[0]])
    if tables:
        _draw_growth(rows[-1].subplots(1, len(tables), squeeze=False)[0], tables)
    return figure


def _draw_bars(axes: Axes, suite: dict[str, Any], title: str) -> None:
    samples = dict(reversed(suite["samples"].items()))
    middles = [median(values) for values in samples.values()]
    spread = [
        [middle - min(values) for middle, values in zip(middles, samples.values(), strict=True)],
        [max(values) - middle for middle, values in zip(middles, samples.values(), strict=True)],
    ]
    colors = [_OWN_COLOR if "resnext_ignite" in name else _PEER_COLOR for name in samples]
    axes.barh(list(samples), middles, xerr=spread, color=colors, ecolor="0.2", capsize=2)
    for position, (middle, values) in enumerate(zip(middles, samples.values(), strict=True)):
        text = f"{middle:,.0f}" if middle >= 1000 else f"{middle:.3g}"
        axes.text(max(values), position, f"  {text}", va="center", fontsize=8)
    axes.set_xlim(right=1.1 * max(max(values) for values in samples.values()))
    axes.xaxis.set_major_formatter("{x:,g}")
    subject = f"{title}, {suite['model']}" if "model" in suite else title
    axes.set_title(f"{subject} ({suite['unit']})", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_growth(all_axes: Any, tables: dict[str, dict[str, dict[str, float]]]) -> None:
    for axes, (what, table) in zip(all_axes, tables.items(), strict=True):
        sizes = [int(size) for size in table]
        for key, style, label in (("seconds", "o-", "time"), ("peak_bytes", "s--", "memory")):
            values = [row[key] for row in table.values()]
            axes.plot(sizes, [value / values[0] for value in values], style, markersize=3, label=label)
        axes.plot(sizes, [size / sizes[0] for size in sizes], color="0.8", label="in proportion", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{size // 1000}k" if size >= 10_000 else str(size) for size in sizes], minor=False)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0.5, 10)
        axes.set_title(what, fontsize=9)
        axes.tick_params(labelsize=7)
    all_axes[0].legend(fontsize=7)
    all_axes[0].set_ylabel("relative to the first size", fontsize=8)
