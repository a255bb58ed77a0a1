"""Training hooks: the example in the documentation, and the calls during a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cbsa_lightning.networks.hooks import Moment
from cbsa_lightning.networks.processes import WholeBatch, mean_over
from cbsa_lightning.networks.sarb import SARB
from partial import PartialSquares, tiny_system
from tiny_data import tiny_data, tiny_trainer


@pytest.fixture(scope="module")
def centered():
    text = (Path(__file__).resolve().parents[1] / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count("\n") <= 32
    found = {}
    exec(code, found)
    return found["Centered"]


def fit(folder, squares, network, epochs=2, **settings):
    module = tiny_system(network, **settings)
    trainer = tiny_trainer(folder, epochs)
    trainer.fit(module, datamodule=tiny_data(PartialSquares(squares), labeled_fraction=None))
    return module, trainer


def test_the_documented_example(centered, tmp_path, squares_folder):
    module, trainer = fit(tmp_path, squares_folder, centered)
    metrics = trainer.callback_metrics
    assert metrics["train/loss_means"] > 0
    assert float(metrics["train/loss"]) == pytest.approx(float(metrics["train/loss_sup"] + metrics["train/loss_means"]))
    # In the last epoch, the hooks received the features of known positives in plain images.
    data, hooks = trainer.datamodule, module.network.hooks
    labels = data.labeled_targets()
    seen = []
    hooks.before_epoch = lambda seen_now, moment: seen.append(seen_now)
    trainer.callbacks[[type(c).__name__ for c in trainer.callbacks].index("RunHooks")].on_train_epoch_start(
        trainer, module
    )
    rows, classes = (labels == 1).nonzero(as_tuple=True)
    assert torch.equal(seen[0].rows, rows)
    assert torch.equal(seen[0].classes, classes)
    loader = data.plain_dataloader(data.split.labeled)
    with torch.no_grad():
        features = torch.cat([module.eval().network(module.features_of(b)).label_features for b in loader])
    torch.testing.assert_close(seen[0].features, features[rows, classes])


def test_weight_decay_does_not_change_unused_parameters(tmp_path, squares_folder):
    settings = {"optimizer": lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1)}

    def small(names, **more):
        return SARB(names, dim=8, attention_width=6, start_epoch=1, prototypes=2, **more)

    alphas = []
    for epochs in (1, 2):
        module, _ = fit(tmp_path, squares_folder, small, epochs, **settings)
        alphas.append(float(module.network.hooks.alpha.detach()))
    assert alphas[0] == 0.5
    assert alphas[1] != 0.5


def test_random_numbers_depend_on_seed_epoch_and_step():
    draws = [torch.rand(1, generator=Moment(*at).generator()).item() for at in ((1, 2, 5, 3), (1, 2, 9, 3))]
    assert draws[0] == draws[1]
    others = [Moment(2, 2, 5, 3), Moment(1, 3, 5, 3), Moment(1, 2, 5, 4)]
    assert len({torch.rand(1, generator=moment.generator()).item() for moment in others} | {draws[0]}) == 4
    assert Moment(2, 1, 4).passed == 2.25


def test_a_batch_of_one_process_is_complete():
    whole, x = WholeBatch(torch.tensor([True, True, False])), torch.rand(3, 2)
    assert whole.join(x) is x
    assert whole.places.tolist() == [0, 1, 2]
    assert len(whole) == 3
    assert float(mean_over(x, x > 2)) == 0
    torch.testing.assert_close(mean_over(x, x > 0), x.mean())
