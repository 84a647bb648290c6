"""What a step sends, against the one reduction of all gradients of plain data parallelism."""

import pytest
import rank_jobs
import rank_sharded

MOST = {"exact": 3.1, "reuse": 2.1}  # times the bytes of all gradients
# the header, the selector's input, the dots, the end; with online features those of the validation
GATHERS = {False: 4, True: 5}


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("schedule", list(MOST))
def test_bytes_and_messages_of_a_step(ranks, schedule, online):
    options = {"schedule": schedule, "online": online, "model": "large"}
    for calls, sizes, gradients in ranks.results(rank_jobs.count_messages, 2, options):
        assert set(calls) == {"all_reduce", "all_gather"}, calls  # no barrier, no broadcast
        learns = schedule == "reuse"  # rows 7 and 8 are not beside a reduction there
        assert calls["all_gather"] == GATHERS[online] + learns
        assert sum(sizes.values()) <= MOST[schedule] * gradients
        # every reduction is one of all gradients: none is small
        assert calls["all_reduce"] == int(MOST[schedule])


def test_a_step_without_the_selector_sends_what_plain_training_does(ranks):
    options = {"selector_every": 100, "online": False, "model": "large"}
    for calls, sizes, gradients in ranks.results(rank_jobs.count_messages, 2, options):
        assert calls["all_reduce"] == 1 and calls["all_gather"] == 3
        assert sum(sizes.values()) <= 1.05 * gradients


# forwards and backwards that gather the parameters (two each in plain training), and row 6, whose
# pass gathers them twice and v once
GATHERS_OF_SHARDS = {"exact": 3 * 2 + 2 + 1, "reuse": 2 * 2 + 2 + 1}


@pytest.mark.parametrize("schedule", list(MOST))
def test_bytes_of_a_sharded_step(ranks, schedule):
    for ours, plain in ranks.results(rank_sharded.sent_bytes, 2, {"schedule": schedule}):
        assert plain["reduce"] > 0 and plain["gather"] > 0
        assert ours["reduce"] <= MOST[schedule] * plain["reduce"]
        assert ours["gather"] <= 1.05 * GATHERS_OF_SHARDS[schedule] / 2 * plain["gather"]
