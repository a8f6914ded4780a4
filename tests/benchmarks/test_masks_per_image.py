"""The benchmark of several masks an image, on a small network."""

import json

import pytest


@pytest.fixture
def masks_per_image():
    import masks_per_image

    return masks_per_image


@pytest.mark.drill
def test_equally_many_pairs_are_compared_and_the_result_is_kept(masks_per_image, tmp_path, capsys):
    small = {"model": "resnet10t", "masks": 2, "mask_ratio": 0.5, "batch": 1, "size": 64, "steps": 3, "repeats": 1}
    options = masks_per_image.Options(**small, threads=1, name=str(tmp_path / "kept"))
    assert masks_per_image.Arm(options, 2, 1).pairs == masks_per_image.Arm(options, 1, 2).pairs == 2
    masks_per_image.main(options)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert set(kept["seconds_a_pair"]) == set(kept["pairs_a_second_behind_a_slow_loader"]) == {"one", "several"}
    assert "times the pairs" in capsys.readouterr().out


def test_a_throttled_loader_gives_as_many_batches_as_asked(masks_per_image):
    assert len(list(masks_per_image.throttled(0, 3))) == 3
