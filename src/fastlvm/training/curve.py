"""What a run's history looks like: a PNG with matplotlib, scalars with TensorBoard, where these are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlvm.files import atomic_file

CURVE, BOARD = "history.png", "tensorboard"


def draw(history: list[dict[str, Any]], folder: Path) -> None:
    """Loss and validation R@5 over epochs as `history.png`; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [entry["epoch"] for entry in history]
    left, right = figure.subplots(1, 2)
    trained = [(entry["epoch"], entry["train_loss"]) for entry in history if entry["train_loss"] is not None]
    if trained:
        left.plot(*zip(*trained, strict=True), label="training")
    left.plot(epochs, [entry["val_loss"] for entry in history], label="validation")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend(frameon=False)
    right.plot(epochs, [entry["val_r@5"] for entry in history])
    right.axhline(history[0]["val_r@5"], linestyle=":", color="grey", label="untrained")
    right.set(xlabel="epoch", ylabel="validation R@5")
    right.legend(frameon=False)
    with atomic_file(folder / CURVE) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


class Board:
    """Scalars of each epoch for TensorBoard; without it nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def add(self, entry: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder / BOARD), purge_step=entry["epoch"])
        for name, value in entry.items():
            if name not in ("epoch", "gates") and value is not None:
                self._writer.add_scalar(name, value, entry["epoch"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
