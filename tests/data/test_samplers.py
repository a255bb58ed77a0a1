from __future__ import annotations

from collections import Counter
from itertools import zip_longest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from cbsa_lightning.data import annotations
from cbsa_lightning.data.samplers import Draw, InOrderBatches, LabeledBatches, PairedBatches
from cbsa_lightning.errors import ConfigError

LABELED = np.array([3, 8, 1, 40, 22, 17, 5])
UNLABELED = np.arange(100, 153)


def paired(seed=0, rank=0, world_size=1, labeled=LABELED, unlabeled=UNLABELED):
    return PairedBatches(labeled, unlabeled, 4, 12, seed, None, rank, world_size)


def rows(batches):
    return [[draw.index for draw in batch] for batch in batches]


def test_one_labeled_pass_contains_every_image_once():
    batches = LabeledBatches(LABELED, 3, seed=1)
    got = list(batches)
    assert [len(batch) for batch in got] == [3, 3, 1]
    assert len(batches) == 3
    assert sorted(draw.index for batch in got for draw in batch) == sorted(LABELED.tolist())
    assert all(draw.epoch == 0 and draw.visit == 0 for batch in got for draw in batch)


def test_every_pass_has_a_new_order_and_visits_are_counted():
    batches = LabeledBatches(LABELED, 4, seed=1, num_batches=14)
    draws = [draw for batch in batches for draw in batch]
    assert len(batches) == 14
    assert len(draws) == 14 * 4 == 8 * len(LABELED)
    passes = [draws[start : start + 7] for start in range(0, 56, 7)]
    for visit, one in enumerate(passes):
        assert sorted(draw.index for draw in one) == sorted(LABELED.tolist())
        assert {draw.visit for draw in one} == {visit}
    assert len({tuple(draw.index for draw in one) for one in passes}) == 8  # 7! orders: repeats are unlikely


def test_every_draw_of_an_epoch_is_unique():
    draws = [draw for batch in LabeledBatches([4, 2], 5, seed=0, num_batches=9) for draw in batch]
    assert len(draws) == len(set(draws)) == 45


def test_a_paired_epoch_is_one_pass_over_unlabeled_images():
    batches = paired()
    got = list(batches)
    assert [len(batch) for batch in got] == [16, 16, 16, 16, 4 + 5]
    assert len(batches) == 5
    labeled = [draw for batch in got for draw in batch[:4]]
    unlabeled = [draw for batch in got for draw in batch[4:]]
    assert sorted(draw.index for draw in unlabeled) == UNLABELED.tolist()
    assert {draw.visit for draw in unlabeled} == {0}
    counts = Counter(draw.index for draw in labeled)
    assert set(counts) == set(LABELED.tolist())
    assert set(counts.values()) == {2, 3}
    assert [draw.visit for draw in labeled] == [0] * 7 + [1] * 7 + [2] * 6


def test_a_large_labeled_batch_continues_with_the_next_pass():
    batch = next(iter(PairedBatches([7, 9], [1, 2, 3], 5, 3, seed=0)))
    assert [draw.visit for draw in batch[:5]] == [0, 0, 1, 1, 2]
    assert {draw.index for draw in batch[:2]} == {draw.index for draw in batch[2:4]} == {7, 9}


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: LabeledBatches(range(50), 8, seed),
        lambda seed: LabeledBatches(range(50), 8, seed, num_batches=20),
        lambda seed: paired(seed),
    ],
)
def test_order_is_a_function_of_seed_and_epoch(make):
    batches, again = make(5), make(5)
    first = list(batches)
    assert first == list(batches) == list(again)  # only the epoch changes the order
    batches.set_epoch(1)
    second = list(batches)
    assert rows(second) != rows(first)
    assert {draw.epoch for batch in second for draw in batch} == {1}
    again.set_epoch(3)
    again.set_epoch(1)
    assert second == list(again)
    assert rows(make(6)) != rows(first)


def test_first_draws_are_pinned():
    # Drawn by the first release; a change here would change every repeated or resumed run.
    batches = PairedBatches(np.arange(10), np.arange(10, 300_000), 4, 6, seed=3)
    batches.set_epoch(2)
    assert rows([next(iter(batches))]) == [[9, 3, 4, 1, 248411, 59690, 2064, 249482, 206041, 164409]]
    batches = LabeledBatches(np.arange(7), 5, seed=4, num_batches=4)
    batches.set_epoch(1)
    assert rows(batches) == [[2, 6, 0, 3, 5], [1, 4, 3, 6, 5], [2, 1, 4, 0, 6], [5, 4, 1, 2, 0]]
    assert [draw.visit for batch in batches for draw in batch] == [0] * 7 + [1] * 7 + [2] * 6


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 53, 1000])
def test_draws_equal_a_whole_permutation(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(annotations, "_ROWS", rows_at_a_time)

    def plain(indices, stream, visit):
        rng = np.random.default_rng(np.random.SeedSequence(9, spawn_key=(stream, 5, visit)))
        return [Draw(index, 5, visit) for index in rng.permutation(indices).tolist()]

    batches = paired(seed=9)
    batches.set_epoch(5)
    assert [draw for batch in batches for draw in batch[4:]] == plain(UNLABELED, 1, 0)
    cycles = [draw for visit in range(3) for draw in plain(LABELED, 0, visit)]
    assert [draw for batch in batches for draw in batch[:4]] == cycles[:20]
    in_order = InOrderBatches(UNLABELED, 10, epoch=5)
    assert [draw for batch in in_order for draw in batch] == [Draw(i, 5, 0) for i in UNLABELED.tolist()]


def test_labeled_and_unlabeled_orders_are_independent():
    same = np.arange(30)
    batches = PairedBatches(same, same, 6, 6, seed=2)
    labeled, unlabeled = zip(*[(b[:6], b[6:]) for b in rows(batches)], strict=True)
    assert labeled != unlabeled


def test_changing_the_epoch_does_not_change_a_running_iteration():
    batches, reference = paired(), list(paired())
    iterator = iter(batches)
    got = [next(iterator)]
    batches.set_epoch(7)
    got += list(iterator)
    assert got == reference


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 40),
    lb=st.integers(1, 9),
    ub=st.integers(1, 9),
    world=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_ranks_together_have_the_batches_of_one_process(n, m, lb, ub, world, epoch):
    def make(kind, rank, size):
        if kind == "paired":
            sampler = PairedBatches(range(n), range(100, 100 + m), lb, ub, 0, None, rank, size)
        else:
            sampler = LabeledBatches(range(n), lb, 0, kind, rank, size)
        sampler.set_epoch(epoch)
        return sampler

    for kind in ("paired", None, 6):
        whole = make(kind, 0, 1)
        try:
            shares = [make(kind, rank, world) for rank in range(world)]
        except ConfigError:
            parts = [([d for d in b if d.index < 100], [d for d in b if d.index >= 100]) for b in whole]
            shares = [a[rank::world] + b[rank::world] for a, b in parts for rank in range(world)]
            assert [] in shares  # refused for this reason only
            continue
        assert {len(share) for share in shares} == {len(whole)}
        for parts in zip(whole, *shares, strict=True):
            assert Counter(parts[0]) == sum((Counter(part) for part in parts[1:]), Counter())
            assert all(parts[1:])  # no rank skips a step
            lengths = [len(part) for part in parts[1:]]
            assert max(lengths) - min(lengths) <= 2  # at most one of each part


def samplers(kind, rank=0, world_size=1, epoch=0):
    """Returns batches of 19 labeled and 53 unlabeled images, large enough for eight processes."""
    labeled, unlabeled = np.arange(19), np.arange(100, 153)
    made = {
        "paired": lambda: PairedBatches(labeled, unlabeled, 9, 4, 2, None, rank, world_size),
        "one pass": lambda: LabeledBatches(labeled, 11, 2, None, rank, world_size),
        "a given number": lambda: LabeledBatches(labeled, 9, 2, 12, rank, world_size),
        "in order": lambda: InOrderBatches(unlabeled, 7, rank, world_size, epoch),
    }[kind]()
    made.set_epoch(epoch)
    return made


def dealt_out(shares):
    """Interleaves the draws of all ranks."""
    return [draw for turn in zip_longest(*shares) for draw in turn if draw is not None]


@pytest.mark.parametrize("kind", ["paired", "one pass", "a given number"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("epoch", [0, 5])
def test_shares_of_all_ranks_form_the_global_batch_in_order(kind, world, epoch):
    whole = list(samplers(kind, epoch=epoch))
    ranks = [list(samplers(kind, rank, world, epoch)) for rank in range(world)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        both = [
            [[draw for draw in b if (draw.index < 100) == known] for b in (batch, *shares)] for known in (True, False)
        ]
        assert [draw for expected, *_ in both for draw in expected] == batch
        for expected, *found in both:
            assert dealt_out(found) == expected
            assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_sequential_shards_form_one_pass_in_order(world):
    whole, *shards = (
        [draw for batch in samplers("in order", rank, size, epoch=4) for draw in batch]
        for rank, size in [(0, 1), *((rank, world) for rank in range(world))]
    )
    assert dealt_out(shards) == whole == [Draw(row, 4, 0) for row in range(100, 153)]


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("kind", ["paired", "a given number"])
def test_orders_do_not_repeat(kind, world):
    """With 19! orders, none repeats within an epoch or in another one, for labeled and unlabeled images."""
    orders = []
    for epoch in range(6):
        ranks = [list(samplers(kind, rank, world, epoch)) for rank in range(world)]
        draws = []
        for shares in zip(*ranks, strict=True):
            draws += dealt_out([[draw for draw in share if draw.index < 100] for share in shares])
        passes = [draws[start : start + 19] for start in range(0, len(draws) - 18, 19)]
        assert len(passes) >= 5
        for visit, one in enumerate(passes):
            assert sorted(draw.index for draw in one) == list(range(19))
            assert {(draw.epoch, draw.visit) for draw in one} == {(epoch, visit)}
            orders.append(tuple(draw.index for draw in one))
        if kind == "paired":
            orders.append(tuple(draw.index for batch in ranks[0] for draw in batch if draw.index >= 100))
    assert len(set(orders)) == len(orders)


def test_a_rank_has_its_labeled_draws_before_its_unlabeled_ones():
    whole = list(paired())
    for rank in (0, 1):
        for batch, share in zip(whole, paired(rank=rank, world_size=2), strict=True):
            assert share == batch[:4][rank::2] + batch[4:][rank::2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sequential_shards_cover_each_image_once_without_padding(world):
    indices = [9, 4, 7, 1, 0, 3, 8]
    seen = []
    for rank in range(world):
        batches = InOrderBatches(indices, 2, rank, world, epoch=3)
        got = list(batches)
        assert len(batches) == len(got)
        assert [i for batch in rows(got) for i in batch] == indices[rank::world]
        assert all(len(batch) == 2 for batch in got[:-1])
        seen += [draw for batch in got for draw in batch]
    assert sorted(seen) == sorted(Draw(i, 3, 0) for i in indices)


def test_empty_sequential_shard_is_allowed():
    batches = InOrderBatches([5], 2, rank=1, world_size=2)
    assert list(batches) == []
    assert len(batches) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabeledBatches([], 2, 0), "no labeled images"),
        (lambda: PairedBatches([], [1], 2, 2, 0), "no labeled images"),
        (lambda: PairedBatches([1], [], 2, 2, 0), "no unlabeled images"),
        (lambda: InOrderBatches([], 2), "no evaluation images"),
        (lambda: LabeledBatches([1], 0, 0), "batch_size is 0"),
        (lambda: LabeledBatches([1], 1, 0, num_batches=0), "num_batches is 0"),
        (lambda: PairedBatches([1], [2], 0, 2, 0), "labeled_per_batch is 0"),
        (lambda: PairedBatches([1], [2], 2, -1, 0), "unlabeled_per_batch is -1"),
        (lambda: LabeledBatches([1], 1, -4), "seed is -4"),
        (lambda: LabeledBatches([1, 2], 2, 0, rank=2, world_size=2), "rank 2"),
        (lambda: LabeledBatches([True, False], 2, 0), "row numbers"),
        (lambda: LabeledBatches([[1], [2]], 2, 0), "row numbers"),
        (lambda: LabeledBatches(range(5), 4, 0, world_size=2), "1 of 2 processes without images"),
        (lambda: PairedBatches([1], range(5), 1, 4, 0, world_size=2), "1 of 2 processes without images"),
    ],
)
def test_invalid_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


class _Echo(Dataset):
    def __getitem__(self, draw):
        return torch.tensor(draw)


@pytest.mark.parametrize("workers", [0, 2])
def test_items_do_not_depend_on_the_number_of_workers(workers):
    batches = paired(seed=3)
    loader = DataLoader(_Echo(), batch_sampler=batches, num_workers=workers)
    assert loader.batch_sampler.sampler is batches
    for epoch in (0, 1):
        loader.batch_sampler.sampler.set_epoch(epoch)  # as Lightning does
        reference = paired(seed=3)
        reference.set_epoch(epoch)
        got = [[Draw(*row) for row in batch.tolist()] for batch in loader]
        assert got == list(reference)
        assert len(loader) == len(got)
