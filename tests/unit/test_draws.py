"""Draws are what they have been since a place has turns, and every place has its own."""

import itertools

import numpy as np
import pytest

from megatron_opd.contracts.draws import Stream, entropy, generator, request_seed

PLACE = (1, 2, 3, 4)  # seed, step, task, sample


def test_a_single_turn_draws_what_it_always_drew() -> None:
    """Numbers of version 0.1, which had no turns: runs of that version go on as they would have."""
    assert request_seed(*PLACE) == 7661749924751933381
    assert request_seed(*PLACE, 7) == 1479777600912636150  # a mixture's request behind 7 tokens
    assert generator(*PLACE).random(2).tolist() == [0.03022646584024391, 0.9447630975064669]
    coins = generator(*PLACE, Stream.COINS).random(2).tolist()
    assert coins == [0.4521960913952241, 0.3736519199540911]
    assert generator(*PLACE, Stream.PREFIX).integers(100, size=4).tolist() == [98, 16, 33, 80]


def test_turn_0_adds_no_word() -> None:
    assert entropy(*PLACE, turn=0) == PLACE
    assert entropy(*PLACE, turn=2) == (*PLACE, 3, 2)
    assert entropy(*PLACE, Stream.COINS, turn=2) == (*PLACE, 3, 2, 2)
    # a word 0 behind the first four is another stream, so it must not be added
    assert request_seed(*PLACE, 0) != request_seed(*PLACE)


def test_every_turn_sample_and_kind_has_its_own_stream() -> None:
    streams = [(), (Stream.PREFIX,), (Stream.COINS,), (Stream.ENVIRONMENT,)]
    places = itertools.product(range(2), range(2), range(3), range(3), streams, range(4))
    seeds = [
        request_seed(seed, step, task, sample, *stream, turn=turn)
        for seed, step, task, sample, stream, turn in places
    ]
    assert len(set(seeds)) == len(seeds) == 576


@pytest.mark.parametrize("turn", [0, 1, 5])
def test_longer_draws_begin_with_the_shorter_ones(turn: int) -> None:
    long = generator(*PLACE, turn=turn).random(50)
    assert np.array_equal(generator(*PLACE, turn=turn).random(7), long[:7])
