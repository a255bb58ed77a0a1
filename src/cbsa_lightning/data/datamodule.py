"""SSMLLDataModule: labelled and unlabelled images, in weak and strong views, for semi-supervised training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.batches import EvalBatch, TrainBatch
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.readers import Source
from cbsa_lightning.data.readers.unlabelled import read_images
from cbsa_lightning.data.samplers import Draw, InOrderBatches, LabelledBatches, PairedBatches
from cbsa_lightning.data.splits import Split, hold_out, split_known, split_labelled
from cbsa_lightning.data.views import PlainView, StrongView, WeakView
from cbsa_lightning.errors import ConfigError, DataError, listed

View = PlainView | WeakView | StrongView

CAP_BATCH = 64
"""Images a step in CAP; its batch composition and warm-up batch are stated relative to it (facts B1, D2-19, D2-20)."""


class ImageDataset(Dataset[tuple[Any, ...]]):
    """One view of each image of a table, indexed by :class:`Draw`.

    Args:
        table: Paths of the images.
        targets: ``(n, C)`` int8 handed out with the images.
        view: Makes the tensor of an image.
        labelled: ``(n,)`` bool handed out too, or None.
    """

    def __init__(
        self, table: AnnotationTable, targets: np.ndarray, view: View, labelled: np.ndarray | None = None
    ) -> None:
        self.table, self.targets, self.view, self.labelled = table, targets, view, labelled

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, draw: Draw) -> tuple[Any, ...]:
        image = self.view(decode(self.table.file(draw.index)), draw)
        target = torch.from_numpy(self.targets[draw.index])
        if self.labelled is None:
            return image, target, draw.index
        return image, target, draw.index, bool(self.labelled[draw.index])


def _collate_train(items: list[tuple[Any, ...]]) -> TrainBatch:
    images, targets, index, labelled = zip(*items, strict=True)
    return TrainBatch(torch.stack(images), torch.stack(targets), torch.tensor(index), torch.tensor(labelled))


def _collate_eval(items: list[tuple[Any, ...]]) -> EvalBatch:
    images, targets, index = zip(*items, strict=True)
    return EvalBatch(torch.stack(images), torch.stack(targets), torch.tensor(index))


class SSMLLDataModule(L.LightningDataModule):
    """Data of a semi-supervised multi-label run.

    Args:
        source: Where images and labels come from (``cbsa_lightning.data.readers``).
        image_size: Side S of the square that images are resized to, in pixels.
        labelled_fraction: Share p of the training images that keeps its labels, drawn by ``seed``; the labels of
            the others are hidden from training and only used to measure pseudo-labels. None takes the table as it
            is: rows with any known label are labelled, the others are not.
        split_file: A split saved by an earlier run, to be used instead of drawing one.
        held_out_fraction: Share of the labelled images set aside for validation. None: 0 where the source has a
            test table, else 0.2.
        seed: Seed of split, order and views.
        batch_size: B, images a step, labelled and unlabelled together, over all processes.
        labelled_per_batch: Labelled images among them; None: ``max(1, round(1.25 p B))``, CAP's share.
        warmup_batch_size: Labelled images a step while only those are used; None: CAP's, 16 for p = .05 to 64 for
            p = .20, at most B.
        eval_batch_size: Images a step without gradient.
        num_workers: Loader processes. They change speed only, never a view.
        cutout: Side of the square cut from strong views, as a share of the image's.
        predict: Images for ``cbsa predict``: a folder, or a table of paths.

    Raises:
        ConfigError: If sizes do not fit each other or the data.
        DataError: If annotations or images cannot be used; see the readers.
    """

    train_table: AnnotationTable
    test_table: AnnotationTable | None
    split: Split

    def __init__(
        self,
        source: Source,
        image_size: int = 224,
        labelled_fraction: float | None = None,
        split_file: str | None = None,
        held_out_fraction: float | None = None,
        seed: int = 1,
        batch_size: int = 64,
        labelled_per_batch: int | None = None,
        warmup_batch_size: int | None = None,
        eval_batch_size: int = 128,
        num_workers: int = 2,
        cutout: float = 0.5,
        predict: str | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.image_size = image_size
        self.labelled_fraction = labelled_fraction
        self.split_file = split_file
        self.held_out_fraction = held_out_fraction
        self.seed = seed
        self.batch_size = batch_size
        self._labelled_per_batch = labelled_per_batch
        self._warmup_batch_size = warmup_batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.cutout = cutout
        self.predict = predict
        self._ready = False

    @property
    def class_names(self) -> list[str]:
        """The C class names, as the annotations have them."""
        return list(self.source.class_names)

    @property
    def prompt_names(self) -> list[str]:
        """The C class names, as prompts have them."""
        return list(self.source.prompt_names)

    @property
    def labelled_share(self) -> float:
        """p, the share of training images that are labelled: the one asked for, else that of the table."""
        if self.split.fraction is not None:  # int(p n) / n falls short of p: enough to turn a rounding
            return self.split.fraction
        known = len(self.split.labelled)
        return known / max(known + len(self.split.unlabelled), 1)

    @property
    def labelled_per_batch(self) -> int:
        """Labelled images in a batch of the semi-supervised stage."""
        if self._labelled_per_batch is not None:
            return self._labelled_per_batch
        return min(max(1, int(1.25 * self.labelled_share * self.batch_size + 0.5)), self.batch_size - 1)

    @property
    def warmup_batch_size(self) -> int:
        """Images in a batch of labelled images only."""
        if self._warmup_batch_size is not None:
            return self._warmup_batch_size
        return max(1, min(self.batch_size, round(5 * self.labelled_share * CAP_BATCH)))

    def prepare_data(self) -> None:
        """Downloads or generates what the source can make by itself, in one process."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Reads the tables and splits them; everything that can be refused is refused here."""
        if stage == "predict" or self._ready:
            return
        self.train_table, self.test_table = self.source.train(), self.source.test()
        self.split = self._make_split()
        if self.batch_size < 2:
            raise ConfigError(f"batch_size must be at least 2 (one labelled, one unlabelled), got {self.batch_size}.")
        if not 0 < self.labelled_per_batch < self.batch_size:
            raise ConfigError(
                f"labelled_per_batch must lie between 1 and batch_size - 1 = {self.batch_size - 1}, "
                f"got {self.labelled_per_batch}."
            )
        self.train_table.require_files()
        if self.test_table is not None:
            self.test_table.require_files()
        self._check_leaks()
        self._ready = True

    def _make_split(self) -> Split:
        if self.split_file is not None:
            return Split.load(Path(self.split_file), self.train_table)
        if self.labelled_fraction is None:
            split = split_known(self.train_table)
        else:
            split = split_labelled(len(self.train_table), self.labelled_fraction, self.seed, self.train_table.digest())
        share = self.held_out_fraction
        if share is None:
            share = 0.0 if self.test_table is not None else 0.2
        return hold_out(split, share, self.seed) if share else split

    def _check_leaks(self) -> None:
        if self.test_table is None:
            return
        seen = {str(self.train_table.file(i)) for i in range(len(self.train_table))}
        shared = [str(f) for i in range(len(self.test_table)) if str(f := self.test_table.file(i)) in seen]
        if shared:
            raise DataError(
                f"{len(shared)} test image(s) are training images too: {listed(shared)}. A score on them would say "
                "nothing; take them out of one of the two tables."
            )

    def labelled_targets(self) -> torch.Tensor:
        """Labels of the labelled images, ``(m, C)`` int8, in the order of ``split.labelled``."""
        return torch.from_numpy(self.train_table.labels[self.split.labelled])

    def hidden_targets(self) -> torch.Tensor:
        """What the table knows of the unlabelled images, ``(n, C)`` int8, -1 where nothing: for measuring only."""
        return torch.from_numpy(self.train_table.labels[self.split.unlabelled])

    # Loaders ---------------------------------------------------------------------------------------------------

    def _ranks(self) -> dict[str, int]:
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world_size": 1}
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                "Our samplers share the work among processes themselves; pass use_distributed_sampler=False to the "
                "Trainer."
            )
        return {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def _loader(self, dataset: ImageDataset, batches: Any, collate: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            # An own generator: else each new iterator would draw from, and so move, the global random state.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Labelled images alone in the warm-up, then labelled and unlabelled ones.

        The module says which of the two the present epoch is (:meth:`SSMLLModule.stage`); called without a trainer
        this gives the semi-supervised batches.
        """
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        labelled = np.zeros(len(self.train_table), dtype=bool)
        labelled[self.split.labelled] = True
        visible = np.where(labelled[:, None], self.train_table.labels, np.int8(-1))
        dataset = ImageDataset(self.train_table, visible, StrongView(self.image_size, self.seed, self.cutout), labelled)
        stage, second = (module.stage, module.second_stage) if module is not None else ("semi-supervised",) * 2
        paired = self._paired() if second == "semi-supervised" else None  # refused now, not after the warm-up
        if stage == "warm-up":
            batches: Any = LabelledBatches(self.split.labelled, self.warmup_batch_size, self.seed, **self._ranks())
        elif stage == "labelled-only":
            batches = LabelledBatches(
                self.split.labelled,
                self.warmup_batch_size,
                self.seed,
                self._semi_supervised_steps(),
                **self._ranks(),
            )
        else:
            batches = paired
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        batches.set_epoch(epoch)
        return self._loader(dataset, batches, _collate_train)

    def _paired(self) -> PairedBatches:
        if not len(self.split.unlabelled):
            raise DataError(
                "There is no unlabelled image, so nothing to learn from beside the labels. Add rows without labels, "
                "set labelled_fraction below 1, or train on the labels alone (model labeler: LabelledOnly)."
            )
        lb = self.labelled_per_batch
        return PairedBatches(
            self.split.labelled, self.split.unlabelled, lb, self.batch_size - lb, self.seed, **self._ranks()
        )

    def _semi_supervised_steps(self) -> int:
        """Steps of a semi-supervised epoch; a run on labels alone takes as many, so that both are comparable."""
        return len(self._paired()) if len(self.split.unlabelled) else -(-len(self.split.labelled) // self.batch_size)

    def weak_dataloader(self, epoch: int) -> DataLoader[EvalBatch]:
        """Weak views of this process's share of the unlabelled images, in order."""
        table, indices = self.train_table, self.split.unlabelled
        dataset = ImageDataset(table, table.labels, WeakView(self.image_size, self.seed))
        batches = InOrderBatches(indices, self.eval_batch_size, epoch=epoch, **self._ranks())
        return self._loader(dataset, batches, _collate_eval)

    def _eval_loader(self, table: AnnotationTable, indices: np.ndarray | None = None) -> DataLoader[EvalBatch]:
        indices = np.arange(len(table)) if indices is None else indices
        dataset = ImageDataset(table, table.labels, PlainView(self.image_size))
        return self._loader(dataset, InOrderBatches(indices, self.eval_batch_size, **self._ranks()), _collate_eval)

    def eval_table(self) -> AnnotationTable:
        """The images that validation measures: those held out if any were, else the test table."""
        if len(self.split.held_out):
            return self.train_table.select(self.split.held_out)
        if self.test_table is None:
            raise ConfigError("There is neither a test table nor a held-out share to validate on.")
        return self.test_table

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """Images held out from the labelled ones if any were, else the test images."""
        return self._eval_loader(self.eval_table())

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        """The source's test images, or the held-out ones where it has none."""
        return self._eval_loader(self.test_table if self.test_table is not None else self.eval_table())

    def predict_table(self) -> AnnotationTable:
        """The images of ``predict``, all labels unknown."""
        if self.predict is None:
            raise ConfigError("Say which images to predict: --data.predict FOLDER, or a CSV/Parquet table of paths.")
        return read_images(Path(self.predict), self.class_names)

    def predict_dataloader(self) -> DataLoader[EvalBatch]:
        """The images of ``predict``."""
        return self._eval_loader(self.predict_table())
