"""Run by torchrun: train, and leave the gradients of a first batch. argv: folder of payload and windows, out, JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastlvm.data import Payload, Windows
from fastlvm.training import train
from fastlvm.training.ranks import joined
from fastlvm.training.step import Step


def main(folder: str, out: str, text: str) -> None:
    torch.set_num_threads(1)
    settings = json.loads(text)
    kept = Step.__call__
    seen = []

    def spied(self, *args):
        loss = kept(self, *args)
        if not seen:
            seen.append({name: p.grad.clone() for name, p in self.objective.named_parameters()})
            for module in (self.parallel, *self.objective.tower):
                named = module.named_parameters()
                seen[0].update({name.removeprefix("module."): p.grad.clone() for name, p in named})
        return loss

    Step.__call__ = spied
    with joined() as ranks:
        payload, windows = Payload.open(Path(folder) / "payload"), Windows.open(Path(folder) / "windows.npz")
        summary = train(settings.pop("model"), payload, windows, out, **settings)
        assert summary.first_process == ranks.first
        torch.save(seen[0], f"{out}.gradients.{ranks.rank}")
        assert not dist.is_initialized() or dist.get_world_size() == ranks.size


if __name__ == "__main__":
    main(*sys.argv[1:])
