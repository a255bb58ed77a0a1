"""CBSA on one page: trains both stages on the embedded digits in plain torch (docs/explanation/method.md)."""

import torch
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader

from cbsa_lightning.data.augmentations import CutoutRandAugment
from cbsa_lightning.data.datasets import ImageViews, ViewDataset, collate
from cbsa_lightning.data.images import ImageFiles
from cbsa_lightning.data.readers import Digits
from cbsa_lightning.data.samplers import InOrderBatches, LabeledBatches, PairedBatches
from cbsa_lightning.data.splits import split_labeled
from cbsa_lightning.data.views import PlainView, StrongView, WeakView
from cbsa_lightning.method.contexts import context_targets, cooccurrence, partition
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.method.labelers import ClassDistributionAware, positive_rates
from cbsa_lightning.method.losses import asymmetric_loss, context_loss
from cbsa_lightning.networks.cbsa import CBSANetwork
from cbsa_lightning.training.schedules import OneCycle


def loader(table, view, batches, labeled=None):
    """Returns batches of views and labels; labels are hidden if ``labeled`` is False for the image."""
    views = ViewDataset(ImageViews(ImageFiles(table), view), table.labels, labeled)
    return DataLoader(views, batch_sampler=batches, collate_fn=collate)


def train(source, share=0.05, warmup=30, epochs=60, contexts=3, size=160, dropout=0.1, decay=0.98, seed=1):
    """Trains on a fraction of the labels; returns the network, its averaged weights, and mAP on the test images."""
    source.prepare()
    table, test = source.train(), source.test()
    split = split_labeled(len(table), share, seed, table.digest())
    known = torch.from_numpy(table.labels[split.labeled])
    has_labels = torch.isin(torch.arange(len(table)), torch.from_numpy(split.labeled)).numpy()
    torch.manual_seed(seed)
    # The network contains prompts t^s, t^t, image tokens (Eq. 3), decoder (Eq. 4), cosine (Eq. 5) and context head.
    small = {"prompt_length": 4, "decoder_feedforward": 256, "decoder_dropout": dropout}
    network = CBSANetwork(table.prompt_names, "embedded", num_contexts=contexts, **small)
    average, thresholds = ParameterEMA(network, decay), ClassDistributionAware()

    @torch.no_grad()
    def scores(table, view, rows, epoch=0):
        """Returns class logits (n, C) and context logits (n, K), computed with the averaged weights."""
        batches = loader(table, view, InOrderBatches(rows, 128, epoch=epoch))
        network.eval()
        with average.applied_to(network):
            outputs = [network(network.features(batch.images)) for batch in batches]
        return torch.cat([out.logits for out in outputs]), torch.cat([out.context_logits for out in outputs])

    pseudo_labels = torch.full_like(torch.from_numpy(table.labels), -1)  # -1: unknown, ignored by the loss
    context_of = torch.full((len(table),), -1)
    groups = partition(cooccurrence(known), contexts)  # normalized cut of S (Eq. 9, 10)
    context_of[split.labeled] = context_targets(known, groups, contexts)

    def stage(stage_epochs, batches):
        groups_of = [{"params": g["params"], "lr": 1e-3 * g["lr_scale"]} for g in network.parameter_groups()]
        optimizer = torch.optim.AdamW(groups_of, weight_decay=1e-4, fused=True)
        schedule = OneCycle()(optimizer, len(stage_epochs) * len(batches))
        for epoch in stage_epochs:
            if average.started:  # second stage: predict labels and contexts from weak views once per epoch
                logits, context_logits = scores(table, WeakView(size, seed), split.unlabeled, epoch)
                pseudo_labels[split.unlabeled] = thresholds(logits.sigmoid(), positive_rates(known)).labels  # Eq. 6
                confidence, context = context_logits.softmax(1).max(1)
                context_of[split.unlabeled] = torch.where(confidence > 0.9, context, -1)  # Eq. 11, unlabeled
            batches.set_epoch(epoch)
            network.train()
            for batch in loader(table, StrongView(size, seed, CutoutRandAugment(0.25)), batches, has_labels):
                out = network(network.features(batch.images))
                targets = torch.where(batch.labeled[:, None], batch.targets, pseudo_labels[batch.index])
                loss = asymmetric_loss(out.logits, targets).sum()  # Eq. 7 (labels) and Eq. 8 (pseudo-labels)
                loss = loss + context_loss(out.context_logits, context_of[batch.index]).sum()  # Eq. 11 and 12
                optimizer.zero_grad()
                (loss / len(batch.index)).backward()
                optimizer.step()
                schedule.step()
                if average.started:
                    average.update(network)

    stage(range(warmup), LabeledBatches(split.labeled, 16, seed))
    average.start(network)
    stage(range(warmup, epochs), PairedBatches(split.labeled, split.unlabeled, 16, 32, seed))
    return network, average, average_precision_score(test.labels, scores(test, PlainView(size), range(len(test)))[0])


if __name__ == "__main__":
    print(f"mAP {100 * train(Digits('data/digits'))[2]:.1f} %")
