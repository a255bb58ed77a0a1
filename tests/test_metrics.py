import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, precision_score, recall_score
from torchmetrics.classification import MultilabelAveragePrecision

from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.metrics import MultilabelReport, pseudo_label_quality
from reference import metrics as reference


def batch(n=200, num_classes=6, seed=0, values=(-1, 0, 1), decimals=None):
    generator = np.random.default_rng(seed)
    targets = generator.choice(values, size=(n, num_classes)).astype(np.int8)
    logits = (targets + 2 * generator.standard_normal((n, num_classes))).astype(np.float32)
    return (logits if decimals is None else logits.round(decimals)), targets


def report_of(logits, targets, parts=1, **settings):
    metric = MultilabelReport(logits.shape[1], **settings)
    for rows in np.array_split(np.arange(len(logits)), parts):
        metric.update(torch.from_numpy(logits[rows]), torch.from_numpy(targets[rows]))
    return metric.compute()


def harmonic(a, b):
    return 2 * a * b / (a + b)


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("values", [(0, 1), (0, 0, 0, 1), (-1, 0, 1)])
def test_average_precision_equals_scikit_learn(values, decimals):
    logits, targets = batch(values=values, decimals=decimals)
    expected = [
        average_precision_score(targets[targets[:, k] >= 0, k], logits[targets[:, k] >= 0, k]) for k in range(6)
    ]
    found = report_of(logits, targets, parts=7)
    np.testing.assert_allclose(found["AP"], expected, atol=1e-6)
    assert found["mAP"].item() == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["mAP_with_zeros"].item() == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["num_classes_used"].item() == 6


def test_f1_equals_scikit_learn():
    logits, targets = batch(values=(0, 0, 1), decimals=0)  # after rounding, some logits equal the threshold
    found = report_of(logits, targets)
    predicted = (logits >= 0).astype(int)
    precision = precision_score(targets, predicted, average="macro")
    recall = recall_score(targets, predicted, average="macro")
    assert found["CF1"].item() == pytest.approx(harmonic(precision, recall), abs=1e-6)
    assert found["OF1"].item() == pytest.approx(f1_score(targets, predicted, average="micro"), abs=1e-6)


@pytest.mark.parametrize("values", [(0, 1), (-1, 0, 0, 1)])
def test_calibration_equals_a_manual_computation(values):
    logits, targets = batch(values=values)
    found = report_of(logits, targets, parts=3)
    known = targets >= 0
    scores, truth = 1 / (1 + np.exp(-logits[known].astype(float))), targets[known]
    assert found["Brier"].item() == pytest.approx(brier_score_loss(truth, scores), abs=1e-6)
    error = 0.0
    for k in range(15):
        inside = (scores > k / 15) & (scores <= (k + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(scores[inside].mean() - truth[inside].mean())
    assert found["ECE"].item() == pytest.approx(error, abs=1e-6)


def test_calibration_error_is_zero_or_undefined_without_known_entries():
    found = report_of(np.zeros((3, 2), np.float32), np.full((3, 2), -1, np.int8))
    assert not found["ECE"] > 0


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 15), st.integers(1, 4)), st.data())
def test_report_equals_counting(shape, data):
    targets = data.draw(hnp.arrays(np.int8, shape, elements=st.sampled_from([-1, 0, 1])))
    logits = data.draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([-90.0, -1.0, 0.0, 0.5, 20.0, 90.0])))
    found = report_of(logits, targets, parts=2)
    told = [(t == 1).any() and ((t == 0).any() or (t >= 0).all()) for t in targets.T]
    ap, envelope = (
        [measure(logits[:, k], targets[:, k]) if told[k] else math.nan for k in range(shape[1])]
        for measure in (reference.average_precision, reference.envelope_precision)
    )
    np.testing.assert_allclose(found["AP"], ap, atol=1e-6)
    used = [value for value in ap if not math.isnan(value)]
    np.testing.assert_allclose(found["mAP"], np.mean(used) if used else math.nan, atol=1e-6)
    assert found["mAP_with_zeros"].item() == pytest.approx(sum(used) / shape[1], abs=1e-6)
    assert found["num_classes_used"].item() == len(used)
    np.testing.assert_allclose(found["mAP_envelope"], np.nanmean(envelope) if used else math.nan, atol=1e-6)
    assert not found["mAP_envelope"] < found["mAP"] - 1e-6
    _, _, cf1, of1 = reference.f1((logits >= 0).astype(int), targets)
    assert found["CF1"].item() == pytest.approx(cf1, abs=1e-6)
    assert found["OF1"].item() == pytest.approx(of1, abs=1e-6)


def test_a_class_with_only_known_positives_is_excluded():
    targets = np.array([[1, 1, 1], [-1, 1, 0], [1, 1, -1]], dtype=np.int8)
    found = report_of(np.arange(9, dtype=np.float32).reshape(3, 3), targets)
    assert found["AP"].isnan().tolist() == [True, False, False]
    assert found["num_classes_used"].item() == 2
    nothing = report_of(np.zeros((2, 2), np.float32), np.full((2, 2), -1, np.int8))
    assert nothing["mAP"].isnan()
    assert nothing["mAP_envelope"].isnan()
    assert nothing["mAP_with_zeros"] == 0


def test_classes_without_positives_follow_both_conventions():
    logits, targets = batch(values=(0, 1))
    targets[:, 2] = 0
    targets[:, 4] = -1
    found = report_of(logits, targets)
    assert found["AP"].isnan().tolist() == [False, False, True, False, True, False]
    kept = found["AP"][[0, 1, 3, 5]]
    assert found["mAP"].item() == pytest.approx(kept.mean().item())
    assert found["mAP_with_zeros"].item() == pytest.approx(kept.sum().item() / 6)
    assert found["num_classes_used"].item() == 4
    # torchmetrics' macro average does not support classes without known entries, so such a class gets a negative entry.
    targets[:, 4] = 0
    macro = MultilabelAveragePrecision(6, average="macro")
    with pytest.warns(UserWarning, match="No positive samples"):
        theirs = macro(torch.from_numpy(logits).sigmoid(), torch.from_numpy(targets).long())
    assert report_of(logits, targets)["mAP_with_zeros"].item() == pytest.approx(theirs.item(), abs=1e-6)


def test_min_positives_excludes_rare_classes_from_the_mean():
    logits, targets = batch(values=(0, 1))
    targets[:, 1] = 0
    targets[:3, 1] = 1
    found = report_of(logits, targets, min_positives=4)
    assert found["AP"].isnan().tolist() == [False, True, False, False, False, False]
    assert found["mAP"].item() == pytest.approx(np.nanmean(found["AP"].numpy()), abs=1e-6)
    assert found["num_classes_used"].item() == 5
    everything = report_of(logits, targets)
    assert found["mAP_with_zeros"].item() == pytest.approx(everything["mAP"].item())


def test_one_class():
    logits, targets = batch(num_classes=1, values=(0, 1))
    found = report_of(logits, targets)
    assert found["mAP"].item() == pytest.approx(average_precision_score(targets[:, 0], logits[:, 0]), abs=1e-6)
    assert found["CF1"].item() == pytest.approx(f1_score(targets[:, 0], logits[:, 0] >= 0), abs=1e-6)


def test_logits_with_equal_sigmoid_values_keep_their_order():
    logits = torch.tensor([[90.0], [60.0], [30.0], [18.0]])
    metric = MultilabelReport(1)
    metric.update(logits, torch.tensor([[1], [1], [0], [0]]))
    assert (logits.sigmoid() == 1).all()
    assert metric.compute()["mAP"].item() == 1.0


def test_half_precision_and_reset():
    logits, targets = batch(values=(0, 1))
    metric = MultilabelReport(6)
    metric.update(torch.from_numpy(logits).half(), torch.from_numpy(targets))
    assert torch.equal(metric.compute()["AP"], report_of(logits.astype(np.float16).astype(np.float32), targets)["AP"])
    metric.reset()
    metric.update(torch.zeros(2, 6), torch.ones(2, 6, dtype=torch.int64))
    assert metric.compute()["mAP"].item() == 1.0


def _report_of_a_share(rank, folder, shares):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    logits, targets = batch(n=31)
    metric = MultilabelReport(6)
    rows = shares[rank]
    if rows:
        metric.update(torch.from_numpy(logits[rows]), torch.from_numpy(targets[rows]))
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("first", [[*range(0, 31, 2)], [*range(31)]], ids=["ragged", "one without images"])
def test_two_processes_report_the_same_as_one(tmp_path, first):
    shares = [first, [i for i in range(31) if i not in first]]
    torch.multiprocessing.spawn(_report_of_a_share, (str(tmp_path), shares), nprocs=2)
    expected = report_of(*batch(n=31))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_report_refuses_invalid_input():
    metric = MultilabelReport(3)
    logits = torch.zeros(4, 3)
    logits[1, 2] = math.nan
    with pytest.raises(DataError, match=r"1 of 12 logits are not finite.*\(1, 2\)"):
        metric.update(logits, torch.zeros(4, 3, dtype=torch.int8))
    with pytest.raises(DataError, match="must both be"):
        metric.update(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int8))
    with pytest.raises(DataError, match="must both be"):
        metric.update(torch.zeros(4, 3), torch.zeros(3, 3, dtype=torch.int8))
    with pytest.warns(UserWarning, match="compute"), pytest.raises(DataError, match="no batch was added"):
        MultilabelReport(3).compute()
    with pytest.raises(ConfigError, match="at least 1"):
        MultilabelReport(0)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 15), st.integers(1, 4)), st.data())
def test_pseudo_label_quality_equals_counting(shape, data):
    pseudo, truth = (data.draw(hnp.arrays(np.int8, shape, elements=st.sampled_from([-1, 0, 1]))) for _ in range(2))
    found = pseudo_label_quality(torch.from_numpy(pseudo), torch.from_numpy(truth))
    cp, cr, cf1, of1 = reference.f1(pseudo, truth)
    for name, value in {"precision": cp, "recall": cr, "CF1": cf1, "OF1": of1}.items():
        assert found[name].item() == pytest.approx(value, abs=1e-6), name
    known = truth >= 0
    assert found["coverage"].item() == pytest.approx((pseudo >= 0).mean())
    rate = [(pseudo[known[:, k], k] == 1).mean() if known[:, k].any() else 0.0 for k in range(shape[1])]
    np.testing.assert_allclose(found["positive_rate"], rate, atol=1e-6)
    assert found["class_precision"].mean().item() == pytest.approx(cp, abs=1e-6)


def test_pseudo_label_quality_equals_a_manual_computation():
    pseudo = torch.tensor([[1, 1], [1, -1], [0, 0], [-1, 0]], dtype=torch.int8)
    truth = torch.tensor([[1, 1], [0, 1], [1, 0], [0, -1]], dtype=torch.int8)
    found = pseudo_label_quality(pseudo, truth)
    assert found["class_precision"].tolist() == [0.5, 1.0]
    assert found["class_recall"].tolist() == [0.5, 0.5]
    assert found["CF1"].item() == pytest.approx(0.6)  # harmonic mean of 0.75 and 0.5
    assert found["coverage"].item() == pytest.approx(6 / 8)  # coverage includes the entry with unknown truth
    with pytest.raises(DataError, match="must both be"):
        pseudo_label_quality(pseudo, truth[:2])


def test_labels_are_counted_at_the_current_thresholds():
    rng = np.random.default_rng(5)
    scores, truth = rng.random((200, 4)), rng.integers(0, 2, (200, 4))
    thresholds = np.array([0.1, 0.5, 0.9, np.inf])
    report = MultilabelReport(4)
    report.update(torch.logit(torch.from_numpy(scores)), torch.from_numpy(truth))
    plain = report.compute()
    report.thresholds = torch.from_numpy(thresholds).float()
    found = report.compute()
    given = scores >= thresholds
    precision = precision_score(truth, given, average=None, zero_division=0)
    recall = recall_score(truth, given, average=None, zero_division=0)
    np.testing.assert_allclose(found["precision"], precision, rtol=1e-6)
    np.testing.assert_allclose(found["recall"], recall, rtol=1e-6)
    np.testing.assert_array_equal(found["support"], truth.sum(0))
    assert float(found["CF1"]) == pytest.approx(2 / (1 / precision.mean() + 1 / recall.mean()))
    assert float(found["OF1"]) == pytest.approx(f1_score(truth, given, average="micro"))
    for name in ("CF1", "OF1"):
        assert found[f"{name}_at_half"] == plain[f"{name}_at_half"] == plain[name]
