"""Small runs with one process and with two processes.

All jobs run in the same pair of processes because starting processes takes most of the time. Jobs write their results
to ``root / world size``, and ``test_two_processes.py`` compares the files.
"""

from __future__ import annotations

import copy
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.nn.parallel import DistributedDataParallel

from cbsa_lightning import SSMLLModule
from cbsa_lightning.callbacks.labels import WriteLabels
from cbsa_lightning.callbacks.predictions import WritePredictions
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.views import PlainView
from cbsa_lightning.method.context_task import ContextTask
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.networks.dualcoop import DualCoOp
from cbsa_lightning.networks.dualcoop_plus import DualCoOpPlusPlus
from cbsa_lightning.networks.resnet import ImageNetNetwork
from cbsa_lightning.networks.scpnet import SCPNet
from cbsa_lightning.networks.tai import TaI
from partial import SYSTEMS as PARTIAL
from partial import PartialSquares, tiny_system
from tiny_data import CLASSES, SIZE, Squares, tiny_data, tiny_module, tiny_trainer

TRAIN = 21  # 8 labeled and 13 unlabeled images
EPOCHS, WARMUP = 3, 1
# All last batches are uneven. Warm-up: 5, then 3 labeled images. Second stage: three times 3 labeled + 4 unlabeled
# images, then 3 + 1. Evaluation: 13 = (3 + 3 + 1) + (3 + 3) weak views, and 7 = (3 + 1) + 3 test images.
DATA = {"warmup_batch_size": 5, "labeled_per_batch": 3, "batch_size": 7, "eval_batch_size": 3}


# A small weight, because the context head is scaled below, which also scales its gradient.
CONTEXTS = ContextTask(weight=1e-5, pseudo_weight=1.0)
TABLES = (
    *("tau_pos", "tau_neg", "cut", "positive_rate"),
    *("context_partition", "pseudo_labels", "context_targets"),
)


@dataclass(frozen=True)
class Place:
    """Folders, rank and number of processes of a job."""

    root: Path
    clip: Path
    squares: Path
    rank: int = 0
    world: int = 1

    def folder(self, world: int | None = None) -> Path:
        return self.root / str(world or self.world)

    def save(self, name: str, found: dict[str, Any]) -> None:
        self.folder().mkdir(exist_ok=True)
        torch.save(found, self.folder() / f"{name}-{self.rank}.pt")


class Record(L.Callback):
    """Records tables at the first step of each epoch, the loss of each step, and the metrics of each epoch."""

    def __init__(self, within: Path | None = None):
        self.within = within  # file for a checkpoint from within the second epoch
        self.found: dict[str, Any] = {"tables": [], "steps": [], "epochs": [], "gradients": [], "wrapped": None}

    def setup(self, trainer, module, stage):
        # Rounding of channels-last kernels depends on the batch size; see double_precision().
        if hasattr(module.network, "clip"):
            module.network.clip.tower.to(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def on_train_epoch_start(self, trainer, module):
        """Nor does the context head: before it is first asked, it is made to part the images, some surely, some not."""
        if module.contexts is not CONTEXTS or trainer.current_epoch != module.warmup_epochs:
            return
        head, table = module.network.context_head, trainer.datamodule.train_table
        images = torch.stack([PlainView(SIZE)(decode(table.file(row))) for row in range(len(table))])
        g = module.network.clip.pool(module.network.features(images)).g
        head.weight.mul_(3 / (g @ (head.weight[0] - head.weight[1])).std())
        head.bias.copy_(-head.weight @ g.mean(0))

    def on_train_start(self, trainer, module):
        wrapper, strategy = trainer.model, trainer.strategy
        self.found["split"] = trainer.datamodule.split.unlabeled
        if isinstance(wrapper, DistributedDataParallel):
            self.found["wrapped"] = {
                "strategy": type(strategy).__name__,
                "options": dict(strategy._ddp_kwargs),
                "finds unused": wrapper.find_unused_parameters,
                "static": wrapper.static_graph,
                "number": wrapper._get_ddp_logging_data()["num_parameter_tensors"],
            }

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            tables = {name: copy.deepcopy(getattr(module, name)) for name in TABLES}
            self.found["tables"].append({"epoch": trainer.current_epoch, **tables, "weights": trained(module)})

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if len(self.found["steps"]) in (0, 2):  # first step of each stage
            self.found["gradients"].append({n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step = {"loss": float(outputs["loss"]), "index": batch.index, "labeled": batch.labeled}
        if batch.images is not None:
            step["images"] = batch.images
        self.found["steps"].append(step)
        if self.within is not None and (trainer.current_epoch, batch_idx) == (1, 1):
            trainer.save_checkpoint(self.within)

    def on_train_epoch_end(self, trainer, module):
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        averages = {name: value.clone() for name, value in module.ema.named_buffers()}
        self.found["epochs"].append({"figures": figures, "weights": trained(module), "averages": averages})


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def strategy(place: Place) -> dict[str, Any]:
    return {"strategy": "ddp", "devices": place.world} if place.world > 1 else {}


def fit(
    place: Place,
    name: str,
    *,
    module=None,
    epochs=EPOCHS,
    data=None,
    callbacks=(),
    ckpt_path=None,
    within=None,
    source=None,
    **settings,
):
    """Trains a run in float64 with plain gradient steps, because Adam would amplify rounding errors to full steps."""
    settings = {"warmup_epochs": WARMUP, "decoder_dropout": 0.0, "optimizer": sgd, **settings}
    module = module if module is not None else tiny_module(place.clip, **settings)
    record = Record(within)
    trainer = tiny_trainer(
        place.folder(),
        epochs,
        callbacks=[record, *callbacks],
        enable_checkpointing=bool(callbacks),
        precision="64-true",
        **strategy(place),
    )
    source = source if source is not None else Squares(place.squares, train=TRAIN)
    trainer.fit(module, datamodule=tiny_data(source, **{**DATA, **(data or {})}), ckpt_path=ckpt_path)
    place.save(name, record.found)
    return record.found


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.01, momentum=0.5)  # momentum adds state to resume


def whole_run(place: Place) -> None:
    """Trains the paper's method with a checkpoint per epoch."""
    within = place.folder() / "run" / "within.ckpt"
    fit(place, "run", callbacks=[saves(place, "run")], contexts=CONTEXTS, within=within)


def predictions(place: Place) -> None:
    """Predicts 7 images with the run's last checkpoint and writes a table."""
    writer = WritePredictions(str(place.folder() / "predictions.csv"))
    trainer = tiny_trainer(place.folder(), callbacks=[writer], precision="64-true", **strategy(place))
    data = tiny_data(Squares(place.squares, train=TRAIN), predict=str(place.squares / "test"), **DATA)
    file = place.folder() / "run" / f"epoch={EPOCHS - 1}.ckpt"
    trainer.predict(tiny_module(place.clip), datamodule=data, return_predictions=False, ckpt_path=str(file))
    place.save("predictions", {})


def saves(place: Place, name: str) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=place.folder() / name, filename="{epoch}", save_top_k=-1)


def moved(place: Place, name: str, run: str, world: int, checkpoint: str) -> None:
    """Resumes from a checkpoint that ``world`` processes wrote after or within an epoch of a run."""
    file = place.folder(world) / run / f"{checkpoint}.ckpt"
    fit(place, name, callbacks=[saves(place, name)], ckpt_path=str(file), contexts=CONTEXTS)


def asked_to_end(place: Place) -> None:
    """Sends SIGTERM only to the second process, in the middle of an epoch."""

    class Ask(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx, place.rank) == (1, 1, place.world - 1):
                signal.raise_signal(signal.SIGTERM)

    keeps = ModelCheckpoint(dirpath=place.folder() / "asked to end", save_last=True)
    try:
        fit(place, "asked to end", callbacks=[Ask(), keeps], contexts=CONTEXTS)
    except SIGTERMException:
        place.save("asked to end", {"ended": True})


def kept_features(place: Place) -> None:
    """Fills separate caches with one process and with two processes."""
    fit(place, "kept", data={"feature_cache": cache(place, place.world)}, epochs=1, warmup_epochs=0)


def kept_features_again(place: Place) -> None:
    """Reads with one process the cache that two processes filled."""
    (index,) = (place.folder(2) / "cache").glob("features-*/index.bin")
    before = index.read_bytes()
    found = fit(place, "kept again", data={"feature_cache": cache(place, 2)}, epochs=1, warmup_epochs=0)
    place.save("kept again", {**found, "index": (before, index.read_bytes())})


def cache(place: Place, world: int) -> FeatureCache:
    return FeatureCache(str(place.folder(world) / "cache"), strong_views=1)


def labels_made_once(place: Place) -> None:
    settings = {"labeler": StackedProbes(), "stack_share": 0.5, "epochs": 1, "warmup_epochs": 0}
    fit(place, "once", callbacks=[WriteLabels()], **settings)


# Systems other than the paper's method with contexts (``whole_run``): settings of CBSAModule, or another network.
SYSTEMS: dict[str, dict[str, Any] | partial[Any]] = {
    "CBSA without contexts": {"num_contexts": 0},
    "CBSA on labels alone": {"labeler": LabeledOnly()},
    "CBSA without alignment": {"semantic_alignment": False, "target_prompts": False},
    "CBSA with a frozen pool": {"num_contexts": 0, "train_pool": False},
    "DualCoOp": partial(DualCoOp, prompt_length=2),
    "DualCoOp++": partial(DualCoOpPlusPlus, prompt_length=2),
    "SCPNet": partial(SCPNet, prompt_length=2, hidden=16),
    "TaI": partial(TaI, prompt_length=2),
    "partly labeled": {  # 16 images are partly labeled, the others are unlabeled
        "data": {"labeled_fraction": None, "known_fraction": 0.3, "warmup_batch_size": 6, "min_steps_per_epoch": 3}
    },
    "ImageNet": partial(ImageNetNetwork, backbone="test_resnet", pretrained="random"),
    "ImageNet without batch norm": partial(ImageNetNetwork, backbone="test_efficientnet_ln", pretrained="random"),
}


def system(place: Place, name: str) -> None:
    """Trains one epoch of each stage."""
    made = SYSTEMS[name]
    if isinstance(made, dict):
        fit(place, name, epochs=2, **made)
        return
    torch.manual_seed(0)
    network = made if made.func is ImageNetNetwork else partial(made, clip=str(place.clip))
    fit(place, name, epochs=2, module=SSMLLModule(CLASSES, network, warmup_epochs=WARMUP, ema_decay=0.8, optimizer=sgd))


def partial_system(place: Place, name: str) -> None:
    """Trains two epochs on partial labels, without batch norms, whose statistics depend on the images of a process."""
    module = tiny_system(PARTIAL[name], optimizer=sgd)
    for parent in list(module.network.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.BatchNorm2d) and layer.weight.requires_grad:
                setattr(parent, child, torch.nn.GroupNorm(1, layer.num_features))
    module.ema = ParameterEMA(module.network, 0.0)
    fit(
        place,
        name,
        epochs=2,
        module=module,
        source=PartialSquares(place.squares, train=TRAIN),
        data={"labeled_fraction": None},
    )


BOTH: dict[str, Callable[[Place], None]] = {
    "predictions": predictions,
    "kept": kept_features,
    "once": labels_made_once,
    **{name: partial(system, name=name) for name in SYSTEMS},
    **{name: partial(partial_system, name=name) for name in PARTIAL},
}
PAIR = {
    "run": whole_run,
    "one to two within": partial(moved, name="one to two within", run="run", world=1, checkpoint="within"),
    "one to two": partial(moved, name="one to two", run="run", world=1, checkpoint="epoch=0"),
    **BOTH,
    "asked to end": asked_to_end,
}
AFTER = {
    "kept again": kept_features_again,
    "two to one": partial(moved, name="two to one", run="run", world=2, checkpoint="epoch=0"),
    "asked to end, then one": partial(
        moved, name="asked to end, then one", run="asked to end", world=2, checkpoint="last"
    ),
    "two to one within": partial(moved, name="two to one within", run="run", world=2, checkpoint="within"),
    "one to two to one": partial(moved, name="one to two to one", run="one to two", world=2, checkpoint="epoch=1"),
}


@contextmanager
def double_precision() -> Iterator[None]:
    """Computes everything in float64, including losses and cosines, which convert to float32 with "64-true".

    Rounding depends on the batch size. With one and two processes, results that are equal up to rounding could
    otherwise differ, such as a pseudo-label at its threshold or the ranks of two images. These tests are for the
    algorithm only.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def work(place: Place, jobs: dict[str, Callable[[Place], None]]) -> None:
    """Runs all jobs. If one fails, writes its traceback and continues with the next."""
    for name, job in jobs.items():
        try:
            with double_precision():
                job(place)
        except Exception:
            place.save(name, {"error": traceback.format_exc()})


def process(rank: int, root: str, clip: Path, squares: Path) -> None:
    """Runs one of the two processes with the environment variables of torchrun."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests"}
    torch.set_num_threads(1)
    # Initialized before Lightning does, with a short timeout, because a process waits if only the other one fails.
    meeting = {"init_method": f"file://{root}/meeting", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60), **meeting)
    work(Place(Path(root), clip, squares, rank, 2), PAIR)
    with suppress(RuntimeError):  # the other process may have ended
        torch.distributed.destroy_process_group()


def all_runs(root: Path, clip: Path, squares: Path) -> None:
    """Runs the jobs with one process while the pair of processes starts, and then with the pair."""
    alone = Place(root, clip, squares)
    work(alone, {"run": whole_run})  # first, because the pair resumes from its checkpoints
    pair = torch.multiprocessing.start_processes(
        process, (str(root), clip, squares), nprocs=2, join=False, start_method="spawn"
    )
    work(alone, BOTH)
    while not pair.join():
        pass
    work(alone, AFTER)
