"""SSMLLDataModule: labeled and unlabeled images in weak and strong views for semi-supervised training."""

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
from cbsa_lightning.data.readers import Source
from cbsa_lightning.data.readers.unlabeled import left_out, read_images
from cbsa_lightning.data.samplers import InOrderBatches
from cbsa_lightning.data.settings import check_settings
from cbsa_lightning.data.splits import Split, make_split, partly_labeled
from cbsa_lightning.data.stage_batches import StageBatches
from cbsa_lightning.data.views import PlainView, StrongView, WeakView
from cbsa_lightning.errors import ConfigError, DataError, listed


class SSMLLDataModule(L.LightningDataModule):
    """Data of a semi-supervised multi-label run.

    Args:
        source: Source of images and labels (``cbsa_lightning.data.readers``).
        image_size: Side S of the square that images are resized to, in pixels.
        labeled_fraction: Fraction p of the training images that keep their labels, drawn by ``seed``. The labels of
            the others are hidden from training and only used to evaluate pseudo-labels. None uses the table as it
            is: rows with any known label are labeled, the others are not.
        split_file: A split saved by an earlier run, to be used instead of drawing one.
        known_fraction: Fraction of the labels that stay known, drawn entry by entry with ``seed``. Others are hidden
            from training. None hides none. See :func:`~cbsa_lightning.data.label_masks.known_mask`.
        known_file: A :class:`~cbsa_lightning.data.label_masks.LabelMask` file, to be used instead of drawing a mask.
        unknown_as_absent: Whether unknown labels of labeled images count as absent. For a class with known positives
            but no known negative, they always do.
        held_out_fraction: Fraction of the labeled images set aside for validation. None: 0 if the source has a
            test table, else 0.2.
        seed: Seed of split, order and views.
        batch_size: B, images per step, labeled and unlabeled together, over all ranks.
        labeled_per_batch: Labeled images among them; None: ``max(1, round(1.25 p B))``, as in CAP, or
            ``round((1 + p) / 2 B)`` if p > 2/3.
        warmup_batch_size: Labeled images per step of the warm-up; None: as in CAP, 16 for p = .05 to 64 for
            p = .20, at most B.
        min_steps_per_epoch: Minimum training steps of an epoch. A smaller set is passed several times, so that few
            images are trained on for enough steps. With 1, as in the paper, an epoch is one pass.
        eval_batch_size: Images per step without gradient.
        num_workers: Number of loader workers. They change only the speed, never a view.
        weak_view: Augmentation of the views that pseudo-labels are computed from; None: ``Flip()``. Views of another
            augmentation are always computed from the images, even with a feature cache.
        strong_view: Augmentation of the views that the network is trained on; None: ``CutoutRandAugment()``.
        predict: Images for ``cbsa predict``: a folder, or a table of paths.
        image_cache: Cache of decoded and resized training and test images, so that each file is decoded once instead
            of in every epoch; the views are the same. None decodes the files each time.
        fast_decode: Whether JPEGs are decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of their size with both sides
            at least ``image_size``. For 640 x 480, this is half the size and takes two thirds of the time. Pixels of
            the views change by two gray levels on average and by tens at sharp edges, so use it in all runs that are
            compared, or in none.
        feature_cache: Cache of the frozen tower's features, which are computed once before training. The threshold
            pass and validation then read no images, and neither does training if strong views are cached too. None
            computes them from the images each time.
        on_error: Handling of unreadable images: "stop" refuses them before the first step, "skip" trains and
            evaluates without them; :attr:`left_out` lists them. Only header and end of each file are checked, so damage
            within a file still stops a run when it is read.

    Attributes:
        left_out: Files of the images that were skipped.
        label_mask: The known training labels if ``known_fraction`` or ``known_file`` hides some, else None.
        trained_before: Paths of images, as in the table or in full, that must not be held out for validation, since the
            initial weights were trained on their labels.
        gives_unread: Whether an unreadable image to predict becomes a black image that its batch reports; otherwise it
            is an error.

    Raises:
        ConfigError: If sizes do not fit each other or the data.
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
        """The C class names as in the annotations."""
        return list(self.source.class_names)

    @property
    def prompt_names(self) -> list[str]:
        """The C class names as used in prompts."""
        return list(self.source.prompt_names)

    @property
    def labeled_share(self) -> float:
        """p, the labeled fraction of the training images: the requested one, or that of the table."""
        return self.split.labeled_share

    @property
    def labeled_per_batch(self) -> int:
        """Labeled images in a batch of the semi-supervised stage."""
        if self._labeled_per_batch is not None:
            return self._labeled_per_batch
        return default_labeled_per_batch(self.labeled_share, self.batch_size)

    @property
    def warmup_batch_size(self) -> int:
        """Images in a batch of labeled images only."""
        if self._warmup_batch_size is not None:
            return self._warmup_batch_size
        return default_warmup_batch_size(self.labeled_share, self.batch_size)

    def prepare_data(self) -> None:
        """Downloads or generates the source's files if it can, and fills the image cache, in one process."""
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
        """Reads and splits the tables; checks as much as possible before training."""
        if stage != "predict" and not self._ready:
            self._set_up(stage)
        # The cache has already decoded all images.
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
        """Returns the rows of each table whose images are skipped because they cannot be read; cached."""
        if self._unreadable is None:
            found = tables.items() if self.on_error == "skip" else ()
            self._unreadable = {part: unreadable(t, np.arange(len(t))) for part, t in found if t is not None}
        return self._unreadable

    def _leave_out(self, skipped: dict[str, np.ndarray]) -> None:
        """Removes the skipped images from the split and the test table, and warns about them."""
        tables = {"train": self.train_table, "test": self.test_table}
        self.left_out = [str(t.file(i)) for part, t in tables.items() if t for i in skipped.get(part, ())]
        if not self.left_out:
            return
        rank_zero_warn(f"{len(self.left_out)} images cannot be read and are skipped: {listed(self.left_out)}.")
        self.split = self.split.without(skipped["train"])
        if self.test_table is not None:
            self.test_table = self.test_table.select(np.delete(np.arange(len(self.test_table)), skipped["test"]))

    def _refuse_unreadable(self) -> None:
        """Checks that the images of the coming fit can be read."""
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
                f"{len(shared)} test image(s) are also training images: {listed(shared)}. A score on them means "
                "nothing; remove them from one of the two tables."
            )

    def with_held_out(self, places: np.ndarray) -> SSMLLDataModule:
        """Returns the same data with some labeled images held out for validation and unchanged batch sizes.

        Args:
            places: Labeled images to hold out, as indices into ``split.labeled``.
        """
        part = copy.copy(self)
        labeled = self.split.labeled
        part.split = replace(self.split, labeled=np.delete(labeled, places), held_out=labeled[places])
        part._labeled_per_batch, part._warmup_batch_size = self.labeled_per_batch, self.warmup_batch_size
        return part

    def labeled_targets(self) -> torch.Tensor:
        """Returns labels of the labeled images, ``(m, C)`` int8, in the order of ``split.labeled``."""
        return torch.from_numpy(self.train_table.labels[self.split.labeled])

    def hidden_targets(self) -> torch.Tensor:
        """Returns the true labels of the images with unknown labels, ``(n, C)`` int8, else -1; only for metrics."""
        return torch.from_numpy(self._truth[self._incomplete])

    @property
    def _incomplete(self) -> np.ndarray:
        """Rows of the images with unknown labels: unlabeled, then partly labeled ones."""
        return np.concatenate([self.split.unlabeled, partly_labeled(self.train_table, self.split)])

    # Features of a frozen tower --------------------------------------------------------------------------------

    def compute_features(self, tower: Tower) -> tuple[RowStore, dict[str, KeptViews]]:
        """Computes this rank's share of the missing features of :attr:`feature_cache`.

        Returns:
            The store, and the cached views of each part of the data set: the input of :meth:`use_features`.

        Raises:
            ConfigError: If the features would exceed the cache's limit or the disk.
            DataError: If an image cannot be read.
        """
        cache = self._cache()
        store = cache.open(tower, self.image_size, self._at_least)
        kept = self._kept_views()
        trainer = self.trainer
        # Ranks on one machine: the folder may be on a local disk.
        share = (trainer.local_rank, trainer.num_devices) if trainer is not None else (0, 1)
        fill(store, tower, list(kept.values()), cache.limit_gb, self.num_workers, *share)
        return store, kept

    def use_features(self, tower: Tower, store: RowStore, kept: dict[str, KeptViews]) -> None:
        """Makes new loaders return features instead of images; all features must have been computed."""
        store.refresh()
        rows = {part: views.rows(store) for part, views in kept.items()}
        missing = sum(int((views.needed & (rows[part] < 0)).sum()) for part, views in kept.items())
        if missing:
            raise DataError(
                f"{store.folder}: {missing} features are missing; was another process stopped? Start again."
            )
        rows["held_out"] = rows["train"][self.split.held_out]
        self._features = Features(tower, store, rows)

    def forget_features(self, tower: Tower | None) -> None:
        """Makes loaders return images again, unless the features are those of ``tower``."""
        if self._features is not None and (tower is None or not self._features.tower.same_as(tower)):
            self._features = None

    def _cache(self) -> FeatureCache:
        if self.feature_cache is None:
            raise ConfigError("There is no feature_cache to store features in.")
        return self.feature_cache

    @property
    def _strong_views(self) -> int:
        """Returns the number of strong views cached per training image; 0 if nothing is trained."""
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
        """Returns cached features if there are any for this view, else the images."""
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
                "Our samplers share the work among processes themselves; pass use_distributed_sampler=False to the "
                "Trainer."
            )
        return {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def _loader(self, dataset: ViewDataset, batches: Any, collate: Any = collate) -> DataLoader[Any]:
        return ResumableLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            # A separate generator: otherwise each new iterator would advance the global random state.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Returns only labeled images in the warm-up, then labeled and unlabeled ones.

        The module determines the stage of the current epoch (:meth:`SSMLLModule.stage`). Without a trainer, this method
        returns semi-supervised batches.
        """
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        labeled = np.zeros(len(self.train_table), dtype=bool)
        labeled[self.split.labeled] = True
        view = StrongView(self.image_size, self.seed, self.strong_view)
        dataset = ViewDataset(self._views("train", self._train_images, view), self.train_table.labels, labeled)
        stage, second = (module.stage, module.second_stage) if module is not None else ("semi-supervised",) * 2
        stages = self._batches()
        paired = stages.semi_supervised() if second == "semi-supervised" else None  # errors appear before the warm-up
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
        """Returns weak views of this rank's share of the images with unknown labels, in order."""
        table, indices = self.train_table, self._incomplete
        view = WeakView(self.image_size, self.seed, self.weak_view)
        dataset = ViewDataset(self._views("train", self._train_images, view), table.labels)
        batches = InOrderBatches(indices, self.eval_batch_size, epoch=epoch, **self._ranks())
        return self._loader(dataset, batches)

    def plain_dataloader(self, rows: np.ndarray) -> DataLoader[EvalBatch]:
        """Returns plain views of this rank's share of some ``rows`` of the train table, in order.

        Returns images if features of some rows are not cached: those of the unlabeled images in a labels-only run.
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
        """Returns the images for validation: those held out if any were, else the test table."""
        return self._evaluated()[1]

    def _evaluated(self) -> tuple[str, AnnotationTable, Images]:
        if len(rows := self.split.held_out):
            return "held_out", self.train_table.select(rows), self._train_images.select(rows)
        return self._tested()

    def _tested(self) -> tuple[str, AnnotationTable, Images]:
        if self.test_table is None or self._test_images is None:
            raise ConfigError("There is neither a test table nor a held-out fraction to validate on.")
        return "test", self.test_table, self._test_images

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """Returns images held out from the labeled ones if any were, else the test images."""
        return self._eval_loader(*self._enough(*self._evaluated()))

    def val_images(self) -> DataLoader[EvalBatch]:
        """Like :meth:`val_dataloader`, but always returns images, even with a feature cache."""
        _, table, images = self._evaluated()
        return self._eval_loader(None, table, images)

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        """Returns the source's test images, or the held-out ones if it has none."""
        return self._eval_loader(*self._enough(*(self._evaluated() if self.test_table is None else self._tested())))

    def _enough(self, part: str, table: AnnotationTable, images: Images) -> tuple[str, AnnotationTable, Images]:
        """Raises an error on all ranks if there are fewer images than ranks: an empty rank would block the others."""
        if len(table) < (processes := self._ranks()["world_size"]):
            raise ConfigError(
                f"{len(table)} {part.replace('_', '-')} image(s) for {processes} processes: each needs one. Use fewer "
                "processes, or more images to evaluate on."
            )
        return part, table, images

    def predict_table(self) -> AnnotationTable:
        """Returns the images of ``predict``, all labels unknown."""
        if self.predict is None:
            raise ConfigError("Set the images to predict: --data.predict FOLDER, or a CSV/Parquet table of paths.")
        if self._predicted is None or self._predicted[0] != self.predict:  # cached, since the folder may change
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
        """Returns files in the folder of ``predict`` that are not images, by their suffix."""
        return left_out(self.predict) if self.predict is not None else []
