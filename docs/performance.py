"""The floors under the time of an image, as in docs/performance.md: operations and bytes, over measured rates.

Usage: python docs/performance.py
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
# bf16 products/s and bytes/s: two cores of the CPU of the page's figures, as it measured them; an H200, as sustained.
RATES = {"CPU": (844e9, 75e9), "H200": (790e12, 4.3e12)}


def floors(cost: Cost, flop_per_s: float, bytes_per_s: float) -> tuple[float, float]:
    """Seconds of training on an image in bf16: its operations', and its bytes'."""
    return cost.training_flop / flop_per_s, cost.least_training_bytes(2) / bytes_per_s


def table() -> str:
    """Markdown: each model's cost, and images/s that no training in bf16 passes; in bold the bound that holds."""
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
