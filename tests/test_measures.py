"""Each measure against its definition, written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_headnorm.measures import (
    MEASURES,
    contribution_factor,
    last_real_position,
    sum_over_tokens,
    take_position,
)


@pytest.mark.parametrize(("d_head", "d_model"), [(4, 10), (10, 4), (8, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_factor_gives_the_norm_of_the_d_model_vector(d_head, d_model, dtype, tolerance):
    torch.manual_seed(0)
    z = torch.randn(2, 5, 3, d_head, dtype=dtype)
    W_O = torch.randn(3, d_head, d_model, dtype=dtype)
    explicit = torch.einsum("bphd,hdm->bphm", z.double(), W_O.double()).norm(dim=-1)
    found = MEASURES["head_resid_contrib_norm"].compute(z, contribution_factor(W_O))
    np.testing.assert_allclose(found, explicit, rtol=tolerance)


def test_factor_of_a_null_and_of_a_rank_deficient_head():
    torch.manual_seed(0)
    W_O = torch.randn(2, 4, 10, dtype=torch.float64)
    W_O[0] = 0
    W_O[1, 1] = W_O[1, 0]  # z along (1, -1, 0, 0) adds nothing
    z = torch.tensor([[[[1.0, 2, 3, 4], [1, -1, 0, 0]]]], dtype=torch.float64)
    factor = contribution_factor(W_O)
    contribution = MEASURES["head_resid_contrib_norm"].compute(z, factor)
    output = MEASURES["head_output_norm"].compute(z, factor)
    assert contribution[0, 0, 0] == 0
    assert contribution[0, 0, 1] < 1e-14
    assert (output > 1).all()


def test_norms_of_bfloat16_are_taken_in_float32():
    z = torch.full((1, 1, 1, 64), 3.0, dtype=torch.bfloat16)
    factor = contribution_factor(torch.eye(64, dtype=torch.bfloat16)[None])
    assert MEASURES["head_output_norm"].compute(z, factor).item() == 24
    assert MEASURES["head_resid_contrib_norm"].compute(z, factor).item() == 24
    # The rival: bfloat16 all the way stops growing once a square is below the rounding.
    naive = sum((x * x for x in z.flatten()), start=torch.zeros((), dtype=torch.bfloat16)).sqrt()
    assert naive.item() != 24


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_last_real_position_on_either_side(lengths, left):
    width = max(lengths) + 1
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, width - n :] = 1 if left else 0
        mask[row, : 0 if left else n] = 1
    truth = [width - 1 if left else n - 1 for n in lengths]
    assert last_real_position(mask).tolist() == truth


def test_the_usual_shortcut_is_wrong_under_left_padding():
    mask = torch.tensor([[0, 0, 1, 1]])
    assert (mask.sum(1) - 1).item() != last_real_position(mask).item() == 3


def test_sum_over_tokens_sees_real_tokens_only():
    values = torch.tensor([[[1.0], [3.0], [torch.nan]], [[torch.inf], [10.0], [20.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    total, count = sum_over_tokens(values, mask)
    assert total.flatten().tolist() == [4, 30]
    assert count.flatten().tolist() == [2, 2]
    total, count = sum_over_tokens(values, mask, exclude_first=True)
    assert total.flatten().tolist() == [3, 20]
    assert count.flatten().tolist() == [1, 1]


def test_take_position_keeps_the_axis():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert take_position(x, torch.tensor([2, 0])).tolist() == [[[8, 9, 10, 11]], [[12, 13, 14, 15]]]
