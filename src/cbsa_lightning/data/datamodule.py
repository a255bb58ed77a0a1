"""The class `SSMLLDataModule`, which loads labeled and unlabeled images for semi-supervised training."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from cbsa_lightning import lightning_private
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.augmentations import Augmentation, CutoutRandAugment, Flip
from cbsa_lightning.data.batch_sizes import check_batch, default_labeled_per_batch, default_warmup_batch_size
from cbsa_lightning.data.batches import EvalBatch, TrainBatch
from cbsa_lightning.data.caches.feature_cache import (
    CachedViews,
    FeatureCache,
    Features,
    KeptViews,
    StrongInTurn,
    Tower,
    fill,
    plain,
)
from cbsa_lightning.data.caches.image_cache import ImageCache, Images
from cbsa_lightning.data.caches.store import RowStore, content_keys
from cbsa_lightning.data.datasets import (
    ImageViews,
    ReadableViews,
    ResumableLoader,
    View,
    ViewDataset,
    collate,
    collate_readable,
)
from cbsa_lightning.data.image_check import refuse_unreadable, unreadable
from cbsa_lightning.data.images import ImageFiles
from cbsa_lightning.data.label_masks import LabelMask, make_mask, with_known_labels
from cbsa_lightning.data.labeled_images import rows_among
from cbsa_lightning.data.needed_views import PLAIN, needed_views
from cbsa_lightning.data.progress import shows_progress
from cbsa_lightning.data.readers import Source
from cbsa_lightning.data.readers.unlabeled import left_out, read_images
from cbsa_lightning.data.samplers import InOrderBatches
from cbsa_lightning.data.settings import check_settings
from cbsa_lightning.data.splits import Split, make_split, partly_labeled
from cbsa_lightning.data.stage_batches import StageBatches
from cbsa_lightning.data.views import PlainView, StrongView, WeakView
from cbsa_lightning.errors import ConfigError, DataError, listed


class SSMLLDataModule(L.LightningDataModule):
    """Data module for semi-supervised multi-label training.

    Args:
        source: Source of the images and labels (``cbsa_lightning.data.readers``).
        image_size: Side S of the square that images are resized to, in pixels.
        labeled_fraction: Fraction p of the training images that keep their labels, selected with ``seed``. The labels
            of the other images are hidden from training, and are only used to evaluate pseudo-labels. With None, the
            table is used as it is: rows with any known label are labeled, and the others are unlabeled.
        split_file: File of a split that was saved by an earlier run. If it is given, no split is drawn.
        known_fraction: Fraction of the labels that remain known, selected individually with ``seed``. The other labels
            are hidden from training. None does not hide any labels. See
            :func:`~cbsa_lightning.data.label_masks.known_mask`.
        known_file: File of a :class:`~cbsa_lightning.data.label_masks.LabelMask`. If it is given, no mask is drawn.
        unknown_as_absent: Whether unknown labels of labeled images are treated as absent. If a class has known
            positives but no known negatives, this is always the case.
        held_out_fraction: Fraction of the labeled images that is held out for validation. None uses 0 if the source has
            a test table, and 0.2 otherwise.
        seed: Seed of the split, the order and the views.
        batch_size: B, the number of labeled and unlabeled images per step on all ranks together.
        labeled_per_batch: Number of labeled images among them. None uses ``max(1, round(1.25 p B))``, as in CAP, or
            ``round((1 + p) / 2 B)`` if p > 2/3.
        warmup_batch_size: Number of labeled images per step of the warm-up. None uses CAP's rule, from 16 for p = .05
            to 64 for p = .20, but at most B.
        min_steps_per_epoch: Minimum number of training steps per epoch. An epoch of a small data set then consists of
            several passes, so that training has enough steps. With 1, as in the paper, an epoch is one pass.
        eval_batch_size: Number of images per step without gradients.
        num_workers: Number of loader workers. It affects only the speed, not the views. On a CPU, cached features are
            read without workers.
        weak_view: Augmentation of the views that pseudo-labels are computed from. None uses ``Flip()``. With any other
            augmentation, these views are always computed from the images, even if there is a feature cache.
        strong_view: Augmentation of the views that the network is trained on. None uses ``CutoutRandAugment()``.
        predict: Images for ``cbsa predict``, as a folder or a table of paths.
        image_cache: Cache of decoded and resized training and test images. With a cache, each file is decoded once
            instead of once per epoch. It does not change the views.
        fast_decode: Whether JPEGs are decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of their size for which both
            sides are at least ``image_size``. For 640 x 480 pixels, this is half the size, and decoding takes two
            thirds of the time. The pixels of the views change by two gray levels on average, and by tens of levels
            at sharp edges. Runs can therefore be compared only if they use the same setting.
        feature_cache: Cache of the features of the frozen tower. They are computed once before training. The images are
            then not read for thresholds and validation, nor for training if strong views are cached as well. With
            None, features are computed from the images each time.
        on_error: Handling of unreadable images. "stop" raises an error before the first step. "skip" omits these images
            from training and evaluation and lists them in :attr:`left_out`. Only the header and the end of each file
            are checked, so damage within a file still stops a run when the file is read.

    Attributes:
        left_out: Files of the images that are skipped.
        label_mask: The known training labels if ``known_fraction`` or ``known_file`` hides some, otherwise None.
        trained_before: Paths of images, as in the table or in full, that must not be held out for validation, because
            the initial weights were trained on their labels.
        gives_unread: Whether an unreadable image in ``predict`` is replaced by a black image and reported by its batch.
            Otherwise, it raises an error.

    Raises:
        ConfigError: If sizes are not compatible with each other or with the data.
        DataError: If annotations or images cannot be used; see the readers.
    """

    train_table: AnnotationTable
    test_table: AnnotationTable | None
    split: Split
    label_mask: LabelMask | None

    def __init__(
        self,
        source: Source,
        image_size: int = 224,
        labeled_fraction: float | None = None,
        split_file: str | None = None,
        held_out_fraction: float | None = None,
        seed: int = 1,
        batch_size: int = 64,
        labeled_per_batch: int | None = None,
        warmup_batch_size: int | None = None,
        min_steps_per_epoch: int = 1,
        eval_batch_size: int = 128,
        num_workers: int = 2,
        weak_view: Augmentation | None = None,
        strong_view: Augmentation | None = None,
        predict: str | None = None,
        image_cache: ImageCache | None = None,
        fast_decode: bool = False,
        feature_cache: FeatureCache | None = None,
        on_error: Literal["stop", "skip"] = "stop",
        known_fraction: float | None = None,
        known_file: str | None = None,
        unknown_as_absent: bool = False,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_settings(settings)
        self.source = source
        self.image_size = image_size
        self.labeled_fraction = labeled_fraction
        self.split_file = split_file
        self.known_fraction = known_fraction
        self.known_file = known_file
        self.unknown_as_absent = unknown_as_absent
        self.held_out_fraction = held_out_fraction
        self.seed = seed
        self.batch_size = batch_size
        self._labeled_per_batch = labeled_per_batch
        self._warmup_batch_size = warmup_batch_size
        self.min_steps_per_epoch = min_steps_per_epoch
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.weak_view = weak_view if weak_view is not None else Flip()
        self.strong_view = strong_view if strong_view is not None else CutoutRandAugment()
        self.predict = predict
        self.image_cache = image_cache
        self.fast_decode = fast_decode
        self.feature_cache = feature_cache
        self.gives_unread = False
        self._predicted: tuple[str, AnnotationTable] | None = None
        self.on_error = on_error
        self.left_out: list[str] = []
        self.trained_before: frozenset[str] = frozenset()
        self._unreadable: dict[str, np.ndarray] | None = None
        self._features: Features | None = None
        self._ready = False

    @property
    def class_names(self) -> list[str]:
        """The C class names in the annotations."""
        return list(self.source.class_names)

    @property
    def prompt_names(self) -> list[str]:
        """The C class names to use in prompts."""
        return list(self.source.prompt_names)

    @property
    def labeled_share(self) -> float:
        """p, the labeled fraction of the training images. It is the requested fraction or that of the table."""
        return self.split.labeled_share

    @property
    def labeled_per_batch(self) -> int:
        """Number of labeled images in a batch of the semi-supervised stage."""
        if self._labeled_per_batch is not None:
            return self._labeled_per_batch
        return default_labeled_per_batch(self.labeled_share, self.batch_size)

    @property
    def warmup_batch_size(self) -> int:
        """Number of images in a batch of the warm-up."""
        if self._warmup_batch_size is not None:
            return self._warmup_batch_size
        return default_warmup_batch_size(self.labeled_share, self.batch_size)

    def prepare_data(self) -> None:
        """Downloads or generates the files of the source if possible, and fills the image cache, in one process."""
        self.source.prepare()
        predicting = self.trainer is not None and self.trainer.predicting
        if self.image_cache is not None and not predicting:
            tables = {"train": self.source.train(), "test": self.source.test()}
            for table in tables.values():
                if table is not None:
                    table.require_files()
            skipped = self._skipped(tables)
            for part, table in tables.items():
                if table:
                    self._images(table, skipped.get(part))

    def setup(self, stage: str) -> None:
        """Reads and splits the tables. As many problems as possible are detected here, before training starts."""
        if stage != "predict" and not self._ready:
            self._set_up(stage)
        # With a cache, all images have already been decoded.
        if stage == "fit" and self.trainer is not None and self.on_error == "stop" and self.image_cache is None:
            self._refuse_unreadable()

    def _set_up(self, stage: str) -> None:
        full, self.test_table = self.source.train(), self.source.test()
        self.label_mask = make_mask(full, file=self.known_file, fraction=self.known_fraction, seed=self.seed)
        self.train_table, changed = with_known_labels(full, self.label_mask, self.unknown_as_absent)
        self._truth = full.labels if self.label_mask is not None else self.train_table.labels
        if changed:
            rank_zero_warn(changed)
        if len(self.train_table) or stage != "test":
            self.split = make_split(
                self.train_table,
                file=self.split_file,
                labeled_fraction=self.labeled_fraction,
                held_out_fraction=self.held_out_fraction,
                has_test=self.test_table is not None,
                seed=self.seed,
                keep=np.flatnonzero(rows_among(self.train_table, self.trained_before)),
            )
        else:
            self.split = Split(*np.empty((2, 0), np.int64))
        check_batch(self.batch_size, self.labeled_per_batch)
        self.train_table.require_files()
        if self.test_table is not None:
            self.test_table.require_files()
        self._check_leaks()
        skipped = self._skipped({"train": self.train_table, "test": self.test_table})
        self._leave_out(skipped)
        self._train_images = self._images(self.train_table, skipped.get("train"))
        self._test_images = None if self.test_table is None else self._images(self.test_table)
        self._ready = True

    @property
    def _at_least(self) -> int | None:
        return self.image_size if self.fast_decode else None

    def _images(self, table: AnnotationTable, left_out: np.ndarray | None = None) -> Images:
        files = ImageFiles(table, self._at_least)
        if self.image_cache is None:
            return files
        return self.image_cache.images(files, self.image_size, self.num_workers, left_out)

    def _skipped(self, tables: dict[str, AnnotationTable | None]) -> dict[str, np.ndarray]:
        """Returns the rows of each table that are skipped because their images cannot be read. The result is cached."""
        if self._unreadable is None:
            found = tables.items() if self.on_error == "skip" else ()
            self._unreadable = {part: unreadable(t, np.arange(len(t))) for part, t in found if t is not None}
        return self._unreadable

    def _leave_out(self, skipped: dict[str, np.ndarray]) -> None:
        """Removes the skipped images from the split and the test table, and shows a warning."""
        tables = {"train": self.train_table, "test": self.test_table}
        self.left_out = [str(t.file(i)) for part, t in tables.items() if t for i in skipped.get(part, ())]
        if not self.left_out:
            return
        rank_zero_warn(f"{len(self.left_out)} images cannot be read and are skipped: {listed(self.left_out)}.")
        self.split = self.split.without(skipped["train"])
        if self.test_table is not None:
            self.test_table = self.test_table.select(np.delete(np.arange(len(self.test_table)), skipped["test"]))

    def _refuse_unreadable(self) -> None:
        """Checks that all images that the run uses can be read."""
        split = self.split
        unlabeled = split.unlabeled[:0] if self._learns_from_labels_alone else split.unlabeled
        wanted = [(self.train_table, np.concatenate([split.labeled, unlabeled, split.held_out]))]
        if self.test_table is not None and not len(split.held_out):
            wanted.append((self.test_table, np.arange(len(self.test_table))))
        refuse_unreadable(wanted)

    @property
    def _learns_from_labels_alone(self) -> bool:
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        return module is not None and module.second_stage == "labeled-only"

    def _check_leaks(self) -> None:
        if self.test_table is None:
            return
        shared = self.train_table.shared_files(self.test_table)
        if shared:
            raise DataError(
                f"{len(shared)} test image(s) are also training images: {listed(shared)}. Scores on these images are "
                "not meaningful; remove them from one of the two tables."
            )

    def with_held_out(self, places: np.ndarray) -> SSMLLDataModule:
        """Returns the same data with the given labeled images held out for validation. Batch sizes do not change.

        Args:
            places: Labeled images to hold out, as indices into ``split.labeled``.
        """
        part = copy.copy(self)
        labeled = self.split.labeled
        part.split = replace(self.split, labeled=np.delete(labeled, places), held_out=labeled[places])
        part._labeled_per_batch, part._warmup_batch_size = self.labeled_per_batch, self.warmup_batch_size
        return part

    def labeled_targets(self) -> torch.Tensor:
        """Returns the labels of the labeled images, ``(m, C)`` int8, in the order of ``split.labeled``."""
        return torch.from_numpy(self.train_table.labels[self.split.labeled])

    def hidden_targets(self) -> torch.Tensor:
        """Returns the hidden labels of images with unknown labels, ``(n, C)`` int8, for metrics only. Others are -1."""
        return torch.from_numpy(self._truth[self._incomplete])

    @property
    def _incomplete(self) -> np.ndarray:
        """Rows of the images with unknown labels, first the unlabeled and then the partly labeled ones."""
        return np.concatenate([self.split.unlabeled, partly_labeled(self.train_table, self.split)])

    # Features of a frozen tower --------------------------------------------------------------------------------

    def compute_features(self, tower: Tower) -> tuple[RowStore, dict[str, KeptViews]]:
        """Computes this rank's part of the features that are missing in :attr:`feature_cache`.

        Returns:
            The store, and the cached views of each part of the data set. Pass both to :meth:`use_features`.

        Raises:
            ConfigError: If the features would exceed the limit of the cache or the free disk space.
            DataError: If an image cannot be read.
        """
        cache = self._cache()
        store = cache.open(tower, self.image_size, self._at_least)
        kept = self._kept_views()
        trainer = self.trainer
        # The work is divided among the ranks of one machine, since the folder may be on a local disk.
        share = (trainer.local_rank, trainer.num_devices) if trainer is not None else (0, 1)
        fill(store, tower, list(kept.values()), cache.limit_gb, self.num_workers, *share, show=shows_progress(trainer))
        return store, kept

    def use_features(self, tower: Tower, store: RowStore, kept: dict[str, KeptViews]) -> None:
        """Makes new loaders return features instead of images. All features must have been computed."""
        store.refresh()
        rows = {part: views.rows(store) for part, views in kept.items()}
        missing = sum(int((views.needed & (rows[part] < 0)).sum()) for part, views in kept.items())
        if missing:
            raise DataError(
                f"{store.folder}: {missing} features are missing, possibly because another process was stopped. Start "
                "the run again."
            )
        rows["held_out"] = rows["train"][self.split.held_out]
        self._features = Features(tower, store, rows)

    def forget_features(self, tower: Tower | None) -> None:
        """Makes new loaders return images again, unless the features were computed by ``tower``."""
        if self._features is not None and (tower is None or not self._features.tower.same_as(tower)):
            self._features = None

    def _cache(self) -> FeatureCache:
        if self.feature_cache is None:
            raise ConfigError("The data module has no feature_cache; set one to store features.")
        return self.feature_cache

    @property
    def _strong_views(self) -> int:
        """Returns the number of strong views to cache per training image, which is 0 if no training follows."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        trains = getattr(module, "trains", True)
        return self.feature_cache.strong_views if self.feature_cache is not None and trains else 0

    def _kept_views(self) -> dict[str, KeptViews]:
        """Returns the views to cache for each part of the data set; see :func:`needed_views`."""
        needed = needed_views(
            self.split,
            len(self.train_table),
            partly_labeled(self.train_table, self.split),
            self._strong_views,
            self._learns_from_labels_alone,
        )
        kept = {"train": self._kept(self._train_images, self.train_table, needed)}
        if self.test_table is not None and self._test_images is not None:
            needed = np.zeros((len(self.test_table), needed.shape[1]), dtype=bool)
            needed[:, PLAIN] = True
            kept["test"] = self._kept(self._test_images, self.test_table, needed)
        return kept

    def _kept(self, images: Images, table: AnnotationTable, needed: np.ndarray) -> KeptViews:
        files = [table.file(row) for row in range(len(table))]
        contents = content_keys(files, Path(self._cache().folder) / "contents.json")
        return KeptViews(images, contents, needed, self.image_size, self.strong_view)

    def _views(self, part: str | None, images: Images, view: View) -> ImageViews | CachedViews:
        """Returns the cached features of this view if there are any, otherwise the images."""
        column: Any = plain
        if isinstance(view, WeakView):
            column = view.flips if view.only_flips else None
        elif isinstance(view, StrongView):
            column = StrongInTurn(self._strong_views) if self._strong_views else None
        if self._features is None or part is None or column is None:
            return ImageViews(images, view)
        return CachedViews(self._features.store, self._features.rows[part], column)

    # Loaders ---------------------------------------------------------------------------------------------------

    def _ranks(self) -> dict[str, int]:
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world_size": 1}
        if trainer.world_size > 1 and lightning_private.replaces_samplers(trainer):
            raise ConfigError(
                "The samplers of SSMLLDataModule divide the data among processes themselves; set "
                "use_distributed_sampler=False in the Trainer."
            )
        return {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def _loader(self, dataset: ViewDataset, batches: Any, collate: Any = collate) -> DataLoader[Any]:
        trains_on_cpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cpu"
        # On a CPU, workers compete with the training for the cores, and cached features are read without delay.
        workers = 0 if trains_on_cpu and isinstance(dataset.views, CachedViews) else self.num_workers
        return ResumableLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            # Without a separate generator, each new iterator would advance the global random state.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Returns labeled images during the warm-up, and labeled and unlabeled images afterwards.

        The module determines the stage of the current epoch (:meth:`SSMLLModule.stage`). Without a trainer, this method
        returns the batches of the semi-supervised stage.
        """
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        labeled = np.zeros(len(self.train_table), dtype=bool)
        labeled[self.split.labeled] = True
        view = StrongView(self.image_size, self.seed, self.strong_view)
        dataset = ViewDataset(self._views("train", self._train_images, view), self.train_table.labels, labeled)
        stage, second = (module.stage, module.second_stage) if module is not None else ("semi-supervised",) * 2
        stages = self._batches()
        # The batches are created here, so that errors are raised before the warm-up.
        paired = stages.semi_supervised() if second == "semi-supervised" else None
        batches: Any = paired
        if stage == "warm-up":
            batches = stages.warm_up()
        elif stage == "labeled-only":
            batches = stages.labeled_only()
        if self.trainer is not None:
            batches.set_epoch(self.trainer.current_epoch)
            loop = self.trainer.fit_loop
            batches.skip(loop.epoch_loop.batch_progress.current.ready if loop.restarted_mid_epoch else 0)
        return self._loader(dataset, batches)

    def _batches(self) -> StageBatches:
        return StageBatches(
            self.split,
            partly_labeled(self.train_table, self.split),
            self.batch_size,
            self.labeled_per_batch,
            self.warmup_batch_size,
            self.min_steps_per_epoch,
            self.seed,
            **self._ranks(),
        )

    def weak_dataloader(self, epoch: int) -> DataLoader[EvalBatch]:
        """Returns weak views of this rank's part of the images with unknown labels, in order."""
        table, indices = self.train_table, self._incomplete
        view = WeakView(self.image_size, self.seed, self.weak_view)
        dataset = ViewDataset(self._views("train", self._train_images, view), table.labels)
        batches = InOrderBatches(indices, self.eval_batch_size, epoch=epoch, **self._ranks())
        return self._loader(dataset, batches)

    def plain_dataloader(self, rows: np.ndarray) -> DataLoader[EvalBatch]:
        """Returns plain views of this rank's part of the given ``rows`` of the training table, in order.

        If the features of some rows are not cached, it returns images. In a run that uses only labels, this is the case
        for unlabeled images.
        """
        kept = self._features is None or bool((self._features.rows["train"][rows, PLAIN] >= 0).all())
        return self._eval_loader("train" if kept else None, self.train_table, self._train_images, rows)

    def _eval_loader(
        self, part: str | None, table: AnnotationTable, images: Images, rows: np.ndarray | None = None
    ) -> DataLoader[EvalBatch]:
        dataset = ViewDataset(self._views(part, images, PlainView(self.image_size)), table.labels)
        rows = np.arange(len(table)) if rows is None else rows
        batches = InOrderBatches(rows, self.eval_batch_size, **self._ranks())
        return self._loader(dataset, batches)

    def eval_table(self) -> AnnotationTable:
        """Returns the table of validation images: the held-out images or, if there are none, the test images."""
        return self._evaluated()[1]

    def _evaluated(self) -> tuple[str, AnnotationTable, Images]:
        if len(rows := self.split.held_out):
            return "held_out", self.train_table.select(rows), self._train_images.select(rows)
        return self._tested()

    def _tested(self) -> tuple[str, AnnotationTable, Images]:
        if self.test_table is None or self._test_images is None:
            raise ConfigError("There are no images for validation. Provide a test table or set held_out_fraction.")
        return "test", self.test_table, self._test_images

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """Returns the validation images, which are the held-out images or, if there are none, the test images."""
        return self._eval_loader(*self._enough(*self._evaluated()))

    def val_images(self) -> DataLoader[EvalBatch]:
        """Returns the same as :meth:`val_dataloader`, but never cached features instead of images."""
        _, table, images = self._evaluated()
        return self._eval_loader(None, table, images)

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        """Returns the test images of the source or, if there are none, the held-out images."""
        return self._eval_loader(*self._enough(*(self._evaluated() if self.test_table is None else self._tested())))

    def _enough(self, part: str, table: AnnotationTable, images: Images) -> tuple[str, AnnotationTable, Images]:
        """Checks that each rank has an image, since a rank without images would block the others."""
        if len(table) < (processes := self._ranks()["world_size"]):
            raise ConfigError(
                f"{len(table)} {part.replace('_', '-')} image(s) for {processes} processes, but each process needs "
                "one. Use fewer processes, or provide more images for evaluation."
            )
        return part, table, images

    def predict_table(self) -> AnnotationTable:
        """Returns a table of the images of ``predict``, in which all labels are unknown."""
        if self.predict is None:
            raise ConfigError("Specify the images to label: --data.predict FOLDER, or a CSV/Parquet table of paths.")
        # The table is cached, because files may be added to the folder.
        if self._predicted is None or self._predicted[0] != self.predict:
            self._predicted = self.predict, read_images(Path(self.predict), self.class_names)
        return self._predicted[1]

    def predict_dataloader(self) -> DataLoader[EvalBatch]:
        """Returns the images of ``predict``."""
        table = self.predict_table()
        images = ImageFiles(table, self._at_least)
        if not self.gives_unread:
            return self._eval_loader(None, table, images)
        dataset = ViewDataset(ReadableViews(images, PlainView(self.image_size)), table.labels)
        batches = InOrderBatches(np.arange(len(table)), self.eval_batch_size, **self._ranks())
        return self._loader(dataset, batches, partial(collate_readable, size=self.image_size))

    def predict_left_out(self) -> list[str]:
        """Returns the files in the folder of ``predict`` that are not images according to their suffix."""
        return left_out(self.predict) if self.predict is not None else []
