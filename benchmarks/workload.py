"""Inputs of a measured training step: shapes of the data sets, a network with random weights, and a random batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbsa_lightning import CBSAModule
from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.clip.loading import RANDOM
from cbsa_lightning.data.batches import TrainBatch
from cbsa_lightning.data.readers.coco import COCO_CLASSES
from cbsa_lightning.data.readers.nuswide import NUSWIDE_CLASSES
from cbsa_lightning.data.readers.voc import VOC_CLASSES

DATA = {  # classes, contexts, labeled fraction of a batch
    "COCO": (COCO_CLASSES, 6, 4 / 64),
    "VOC": (VOC_CLASSES, 2, 1 / 8),
    "NUS": (NUSWIDE_CLASSES, 2, 4 / 64),
}
TOWERS = {  # open_clip model, image size
    "RN50": ("RN50-quickgelu", 224),
    "RN101": ("RN101-quickgelu", 448),
    "tiny": (str(Path(__file__).with_name("tiny_clip.json")), 64),  # for tests of the benchmarks
}
HALF = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class Workload(NamedTuple):
    """A data set, an image tower and a batch size, in the notation "COCO:RN50:64"."""

    data: str
    tower: str
    batch: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        data, tower, batch = text.split(":")
        return cls(data, tower, int(batch))

    def module(self, dropout: float = 0.1) -> CBSAModule:
        """Builds CBSA's module with the paper's settings. The weights are random and always the same."""
        names, contexts, _ = DATA[self.data]
        torch.manual_seed(0)
        return CBSAModule(
            names,
            clip=TOWERS[self.tower][0],
            pretrained=RANDOM,
            num_contexts=contexts,
            warmup_epochs=0,
            decoder_dropout=dropout,
        )

    def towers(self) -> FrozenCLIP:
        """Loads the towers of :meth:`module` without its optimizations."""
        torch.manual_seed(0)
        return FrozenCLIP.load(TOWERS[self.tower][0], RANDOM)

    def images(self) -> TrainBatch:
        """Builds a batch of random images and labels."""
        names, _, share = DATA[self.data]
        torch.manual_seed(1)
        size = TOWERS[self.tower][1]
        labeled = torch.arange(self.batch) < max(1, round(share * self.batch))
        targets = (torch.rand(self.batch, len(names)) < 0.05).to(torch.int8).masked_fill(~labeled[:, None], -1)
        images = torch.randint(0, 256, (self.batch, 3, size, size), dtype=torch.uint8)
        return TrainBatch(images, targets, torch.arange(self.batch), labeled)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Builds random pseudo-labels and context targets of the images."""
        names, contexts, _ = DATA[self.data]
        torch.manual_seed(2)
        pseudo = (torch.rand(self.batch, len(names)) < 0.05).to(torch.int8)
        chosen = torch.randint(contexts, (self.batch,))
        return pseudo, torch.nn.functional.one_hot(chosen, contexts).float()


def on(device: str, batch: TrainBatch) -> TrainBatch:
    return TrainBatch(*(None if value is None else value.to(device) for value in batch))


def autocast(device: str, precision: str) -> Any:
    """Returns the autocast context of one of Lightning's precisions."""
    kind = HALF.get(precision)
    return torch.autocast(device, kind or torch.bfloat16, enabled=kind is not None)
