import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_fast.encoder.visible import Places, VisiblePatches, _in_runs, _LayAroundFill, lay_segments
from tests.encoder.masks import masks


@given(masks(), st.sampled_from([1, 2, 3, 8]), st.integers(1, 4))
@settings(max_examples=50)
def test_unpacking_what_was_packed_gives_the_map_with_holes(visible, b, channels):
    h, w = visible.grid
    dense = torch.randn(visible.batch, channels, h * b, w * b)
    packed = visible.pack(dense)
    assert packed.shape == (visible.count, channels, b, b)
    assert torch.equal(visible.unpack(packed), dense * visible.cells(h * b))
    fill = torch.randn(channels)
    expected = torch.where(visible.cells(h * b), dense, fill[:, None, None])
    assert torch.equal(visible.unpack(packed, fill), expected)


@given(masks(), st.sampled_from([1, 2, 3]), st.integers(1, 4))
@settings(max_examples=30)
def test_the_gradients_of_a_map_laid_around_a_fill_are_autograds(visible, b, channels):
    """As unpacking takes them on a GPU."""
    size = len(visible.segments(b)), b * channels
    inputs = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (size, (channels,))]
    to = channels, b, (visible.batch, *visible.grid), visible.segments(b)
    y, expected = _LayAroundFill.apply(*inputs, *to), lay_segments(inputs[0], *to, inputs[1])
    assert torch.equal(y, expected)
    upstream = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(z, inputs, upstream) for z in (y, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@given(masks())
@settings(max_examples=50)
def test_a_mask_and_its_complement_share_out_the_patches(visible):
    assert torch.equal(VisiblePatches.from_mask(visible.mask).index, visible.index)
    holes = visible.complement()
    assert torch.equal(holes.mask, ~visible.mask)


@given(masks(), st.sampled_from([1, 2, 4]))
@settings(max_examples=50)
def test_an_image_of_visible_cells_holds_the_cells_of_that_image_only(visible, b):
    packed = torch.randn(visible.count, 3, b, b)
    images = visible.as_images(packed)
    assert images.shape == (visible.batch, 3, visible.num_visible * b, b)
    assert torch.equal(visible.as_patches(images), packed)
    means = packed.unflatten(0, (visible.batch, -1)).mean((1, 3, 4))
    torch.testing.assert_close(images.mean((2, 3)), means)


def cells_seen(visible, b, ys, xs):
    """Which cell stands at each place of each window, -1 for none, read off the dense map one cell at a time."""
    h, w = visible.grid
    cells = torch.arange(visible.count * b * b, dtype=torch.float64).view(visible.count, 1, b, b)
    numbers = visible.unpack(cells + 1)[:, 0].long() - 1
    out = []
    for patch in visible.patches.tolist():
        image, rest = divmod(patch, h * w)
        top, left = rest // w * b, rest % w * b
        for y in ys:
            for x in xs:
                inside = 0 <= top + y < h * b and 0 <= left + x < w * b
                out.append(int(numbers[image, top + y, left + x]) if inside else -1)
    return out


@given(
    masks(),
    st.sampled_from([1, 2, 3, 4]),
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
)
@settings(max_examples=60)
def test_window_and_cell_tables_are_each_others_transpose(visible, b, ys, xs):
    ys, xs = (tuple(int(-b + u * (3 * b - 1)) for u in axis) for axis in (ys, xs))  # from -b to 2b-1, any order
    nothing = visible.count * b * b
    table = visible.window_table(b, Places(ys, xs)).tolist()
    assert [-1 if t == nothing else t for t in table] == cells_seen(visible, b, ys, xs)
    where = [[] for _ in range(nothing)]
    for place, cell in enumerate(table):
        if cell != nothing:
            where[cell].append(place)
    transposed = visible.cell_table(b, Places(ys, xs)).tolist()
    assert [sorted(p for p in row if p != len(table)) for row in transposed] == where


@given(masks(), st.sampled_from([(1, (3, 3)), (2, (3, 1)), (4, (1, 5))]))
@settings(max_examples=20)
def test_taps_of_one_output_cell_stand_together(visible, geometry):
    b, (ky, kx) = geometry
    ys, xs = (tuple(o - k // 2 + t for o in range(b) for t in range(k)) for k in (ky, kx))
    plain = visible.window_table(b, Places(ys, xs)).view(-1, b, ky, b, kx)
    grouped = visible.window_table(b, Places(ys, xs, (ky, kx)))
    assert torch.equal(grouped, plain.transpose(2, 3).flatten())
    transposed, nothing = visible.cell_table(b, Places(ys, xs, (ky, kx))), visible.count * b * b
    for place, cell in enumerate(grouped.tolist()):
        assert cell == nothing or place in transposed[cell]


def test_a_value_per_image_reaches_every_patch_of_it():
    visible = VisiblePatches(torch.tensor([[0, 2], [1, 3]]), (2, 2))
    assert torch.equal(visible.spread(torch.tensor([[5.0], [7.0]])), torch.tensor([[5.0], [5.0], [7.0], [7.0]]))


def test_unequal_or_empty_masks_are_refused_with_the_numbers():
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one; got 0 to 0"):
        VisiblePatches.from_mask(mask)
    mask[0, 0, 0] = True
    with pytest.raises(ValueError, match="got 0 to 1"):
        VisiblePatches.from_mask(mask)
    with pytest.raises(ValueError, match="bool tensor"):
        VisiblePatches.from_mask(torch.ones(2, 2, 2))


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=20))
def test_numbers_are_made_on_the_device_in_runs_of_even_steps(values):
    made = _in_runs(values, torch.device("cpu"))
    assert made.tolist() == values
    assert made.dtype == torch.int64


def test_a_table_is_made_once_for_each_key():
    visible = VisiblePatches(torch.tensor([[0, 2], [1, 3]]), (2, 2))
    made = []
    tables = [visible.cached_table(("mine", b), lambda b=b: made.append(b) or [b]) for b in (1, 2, 1)]
    assert made == [1, 2]
    assert tables[0] is tables[2]
    assert tables[0] is not tables[1]
    assert visible.segments(4) is visible.segments(4)
    assert visible.segments(4) is not visible.segments(2)
