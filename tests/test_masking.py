import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_fast.masking import num_visible, sample_visible


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**7), st.integers(1, 40), st.integers(1, 15), st.data())
@settings(max_examples=50)
def test_a_mask_depends_on_seed_step_and_position_alone(seed, step, batch, side, data):
    grid, keep = (side, side + 1), data.draw(st.integers(1, side * (side + 1)))
    everyone = sample_visible(seed, step, torch.arange(batch), grid, keep)
    assert everyone.shape == (batch, keep)
    assert (everyone.diff(dim=1) > 0).all(), "ascending, each patch once"
    assert everyone.min() >= 0
    assert everyone.max() < side * (side + 1)
    some = torch.arange(batch // 2, batch)
    assert torch.equal(sample_visible(seed, step, some, grid, keep), everyone[batch // 2 :])


def test_every_patch_is_kept_equally_often_and_pairs_are_independent():
    grid, keep, n = (4, 4), 6, 20000
    chosen = torch.zeros(n, 16).scatter(1, sample_visible(3, 7, torch.arange(n), grid, keep), 1.0)
    share = chosen.mean(0)
    assert (share - keep / 16).abs().max() < 5 * (0.375 * 0.625 / n) ** 0.5
    together = (chosen.T @ chosen / n)[~torch.eye(16, dtype=torch.bool)]
    expected = keep * (keep - 1) / (16 * 15)
    assert (together - expected).abs().max() < 5 * (expected / n) ** 0.5


def test_steps_and_seeds_give_different_masks():
    a = [sample_visible(seed, step, torch.arange(8), (7, 7), 20) for seed in (0, 1) for step in (0, 1)]
    assert all(not torch.equal(a[i], a[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize(("grid", "ratio", "kept"), [((7, 7), 0.6, 20), ((7, 7), 0.75, 12), ((12, 12), 0.75, 36)])
def test_number_kept_is_the_published_one(grid, ratio, kept):
    assert num_visible(grid, ratio) == kept


@pytest.mark.parametrize(
    ("grid", "ratio", "message"),
    [((7, 7), 1.0, "between 0 and 1, got 1.0"), ((7, 7), 0.0, "got 0.0"), ((1, 1), 0.6, "no patch visible of the 1x1"),
     ((1, 1), 0.3, "no patch masked")],
)  # fmt: skip
def test_ratios_that_leave_nothing_are_refused(grid, ratio, message):
    with pytest.raises(ValueError, match=message):
        num_visible(grid, ratio)
