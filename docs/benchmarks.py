"""Table of docs/benchmarks.md: lower bounds of the training time per image, from operations and bytes over the rates.

Usage: python docs/benchmarks.py
"""

from __future__ import annotations

import sys

import torch

from resnext_ignite.models import create_model
from resnext_ignite.models.cost import Cost, cost_of

MODELS = {
    "cifar_resnext11_2x64d": (32, 10, 24),
    "cifar_resnext29_8x64d": (32, 10, 64),
    "cifar_resnext29_16x64d": (32, 10, 64),
    "resnext50_32x4d": (224, 1000, 64),
    "resnext101_32x4d": (224, 1000, 64),
    "resnext101_64x4d": (224, 1000, 64),
}
# bf16 operations/s and bytes/s. CPU: two cores of the page's CPU, as measured there; H200: sustained rates.
RATES = {"CPU": (844e9, 75e9), "H200": (790e12, 4.3e12)}


def floors(cost: Cost, flop_per_s: float, bytes_per_s: float) -> tuple[float, float]:
    """Return two lower bounds of the seconds to train on one image in bf16: from its operations, and from its bytes."""
    return cost.training_flop / flop_per_s, cost.least_training_bytes(2) / bytes_per_s


def table() -> str:
    """Return a Markdown table: each model's cost per image and the upper bounds of its images/s in bf16.

    The tighter of the two bounds is bold.
    """
    lines = [
        "| model, picture | GFLOP | MB | " + " | ".join(f"{m}: by operations | by bytes" for m in RATES) + " |",
        "|" + "---|" * (3 + 2 * len(RATES)),
    ]
    for name, (size, classes, stem) in MODELS.items():
        with torch.device("meta"):
            model = create_model(name, classes, stem_channels=stem)
        cost = cost_of(model, size)
        cells = [f"`{name}`, {size}", f"{cost.training_flop / 1e9:.3g}", f"{cost.least_training_bytes(2) / 1e6:.3g}"]
        for rates in RATES.values():
            seconds = floors(cost, *rates)
            shown = [f"{1 / bound:,.0f}" if bound < 0.01 else f"{1 / bound:.1f}" for bound in seconds]
            cells += [f"**{text}**" if s == max(seconds) else text for text, s in zip(shown, seconds, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
