"""A mask of one's own: rows of text or a picture give the same patches."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from spark_fast.cli.mask_file import read_mask

bits = st.integers(1, 5).flatmap(
    lambda w: st.lists(st.lists(st.booleans(), min_size=w, max_size=w), min_size=1, max_size=5)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@given(bits, st.integers(1, 3))
def test_rows_a_text_and_a_picture_say_the_same(folder, rows, block):
    mask = torch.tensor(rows)
    assume(mask.any() and not mask.all())
    words = ["".join("." if visible else "#" for visible in row) for row in rows]
    (folder / "mask.txt").write_text("\n".join(words) + "\n")
    pixels = mask.repeat_interleave(block, 0).repeat_interleave(block, 1).to(torch.uint8) * 255
    Image.fromarray(pixels.numpy()).save(folder / "mask.png")
    grid = tuple(mask.shape)
    assert torch.equal(read_mask(words, grid), mask)
    assert torch.equal(read_mask([str(folder / "mask.txt")], grid), mask)
    assert torch.equal(read_mask([str(folder / "mask.png")], grid), mask)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([".."], "must have 2 rows of 2 characters, one per patch; it has 1 of 2"),
        (["..", "."], "it has 2 of 1 to 2"),
        (["..", ".x"], r"written with \. \(visible\) and # \(hidden\), not x"),
        (["..", ".."], "hides no patch"),
        (["##", "##"], "hides every patch"),
        (["none.png"], "there is no mask file none.png"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_reason(words, message):
    with pytest.raises(ValueError, match=message):
        read_mask(words, (2, 2))
