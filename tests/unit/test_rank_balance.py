"""Dealing micro-batches to ranks: nothing lost, equal counts, work alike, and fillers that add nothing."""

from dataclasses import fields
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdapo_async.bin_packing import work
from lambdapo_async.packing import MicroBatch, pack
from lambdapo_async.rank_balance import filler, split_over_ranks, work_of
from learner.logprobs import packed_logprobs
from tests.tiny_models import micro_batch, tiny_model
from tests.unit.test_packing import sequence

document_lengths = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=4), max_size=9)


@settings(max_examples=40, deadline=None)
@given(document_lengths, st.integers(1, 5))
def test_ranks_get_every_micro_batch_once_equally_many_and_alike(lengths: list[list[int]], world_size: int) -> None:
    batches = [micro_batch(each) for each in lengths]
    shares = split_over_ranks(batches, world_size)
    assert len(shares) == world_size
    assert {len(share) for share in shares} == {-(-len(batches) // world_size)}
    dealt = list(chain.from_iterable(shares))
    real = [each for each in dealt if any(each is batch for batch in batches)]
    assert len(real) == len(batches) == len({id(each) for each in real})
    assert all(not each.loss_mask_T.any() for each in dealt if not any(each is batch for batch in batches))
    totals = [sum(map(work_of, share)) for share in shares]
    assert max(totals) - min(totals) <= max(map(work_of, batches), default=0)


def test_ranks_work_on_like_micro_batches_at_every_turn() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 400).astype(int).clip(2, 2048)
    batches = pack([sequence(n, int(length)) for n, length in enumerate(lengths)], token_budget=4096, multiple_of=4)
    assert len(batches) % 4 == 0
    shares = split_over_ranks(batches, 4)
    for turn in zip(*shares, strict=True):
        assert min(map(work_of, turn)) > 0.85 * max(map(work_of, turn))


def test_the_rank_with_less_behind_it_takes_the_costlier_micro_batch() -> None:
    shares = split_over_ranks([micro_batch((length,)) for length in (10, 40, 20, 30)], 2)
    assert [[len(each.input_ids_T) for each in share] for share in shares] == [[40, 10], [30, 20]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_too_few_sequences_are_filled_up(world_size: int) -> None:
    batches = pack([sequence(1, 9)], token_budget=32, multiple_of=world_size)
    shares = split_over_ranks(batches, world_size)
    assert [int(share[0].loss_mask_T.sum()) for share in shares] == [8] + [0] * (world_size - 1)


def test_work_is_in_the_packers_units() -> None:
    assert work_of(micro_batch((900, 60))) == work(900, ()) + work(60, ())


def test_a_filler_has_the_columns_of_a_micro_batch() -> None:
    (real,) = pack([sequence(1, 9)], token_budget=32)
    for name in (field.name for field in fields(MicroBatch) if field.name.endswith("_T")):
        column_T, expected_T = getattr(filler(), name), getattr(real, name)
        assert (column_T.shape, column_T.dtype) == ((1,), expected_T.dtype), name


def test_a_filler_runs_both_passes_and_adds_exactly_zero() -> None:
    model = tiny_model()
    logprobs_T, _ = packed_logprobs(model, filler(), temperature=1.0)
    logprobs_T.sum().backward()
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in model.parameters())
