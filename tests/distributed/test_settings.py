"""Ranks under mixed precision, compilation, checkpointing, accumulation; and resumed by others."""

import pytest
import torch
from rank_pool import SLOW
from rank_settings import accumulate, resume, train_float32

SIZES = (6, 6)


SETTINGS = {
    "float32": ({}, 1e-5),
    "bfloat16 autocast": ({"autocast": torch.bfloat16}, 1e-3),
    "float16 autocast with a scaler": ({"autocast": torch.float16, "scaler": True}, 1e-3),
    "float16 autocast": ({"autocast": torch.float16}, 1e-3),
    "bfloat16 parameters": ({"dtype": torch.bfloat16}, 1e-2),
    "checkpointed blocks": ({"checkpointed": True}, 1e-5),
    "compiled blocks": ({"compiled": "blocks"}, 1e-5),
    "a compiled model": ({"compiled": "model"}, 1e-3),
}


QUICK = ("bfloat16 autocast", "float16 autocast", "checkpointed blocks")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in SETTINGS]
)
def test_settings_of_a_step(ranks, name):
    options, tolerance = SETTINGS[name]
    several = ranks.results(train_float32, 2, options, SIZES)
    alone = train_float32(None, options, (sum(SIZES),))
    for part in (0, 1):
        for rank in several:
            torch.testing.assert_close(rank[part], several[0][part], rtol=0, atol=0)
            if tolerance < 1e-3:  # else AdamW makes another direction of the selector's noise
                torch.testing.assert_close(rank[part], alone[part], rtol=tolerance, atol=tolerance)
    dots = torch.cat([rank[2][0] for rank in several]).double()
    cosine = torch.cosine_similarity(dots, alone[2][0].double(), dim=0)
    assert cosine > 1 - tolerance, cosine
    assert {rank[3] for rank in several} == {alone[3]}


def test_ranks_resume_what_others_have_saved(ranks, tmp_path):
    two = ranks.results(resume, 2, str(tmp_path), SIZES, None)
    for size in (4, 2):
        sizes = (12 // size,) * size
        for model, selector, steps in ranks.results(resume, size, str(tmp_path), sizes, 2):
            assert steps == 6
            torch.testing.assert_close(model, two[0][0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(selector, two[0][1], rtol=1e-10, atol=1e-12)


def test_accumulated_calls(ranks):
    alone = accumulate(None, SIZES, 3)
    for model, selector, steps in ranks.results(accumulate, 2, SIZES, 3):
        assert steps == 4
        torch.testing.assert_close(model, alone[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(selector, alone[1], rtol=1e-10, atol=1e-12)
