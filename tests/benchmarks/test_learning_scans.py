"""The generated scans: ten classes of 16 bits that only a texture tells apart."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def scans():
    pytest.importorskip("imagecodecs", reason="16-bit PNG needs imagecodecs")
    import learning_scans

    return learning_scans


def test_a_scan_depends_on_its_number_alone_and_uses_16_bits(scans):
    one, again, other = scans.scan(3, 1), scans.scan(3, 1), scans.scan(4, 1)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert (one.dtype, one.shape) == (np.uint16, (64, 64))
    assert len(np.unique(one)) > 256


def test_the_class_changes_the_texture_and_nothing_else(scans):
    """Same number: background, region, contrast and noise are the same, so most pixels are about equal."""
    of_class = [scans.scan(5, label) / 65535 for label in range(len(scans.CLASSES))]
    for i, image in enumerate(of_class[1:], 1):
        changed = abs(image - of_class[0])
        assert changed.max() > 0.1, scans.CLASSES[i]
        assert np.median(changed) < 0.1, scans.CLASSES[i]


def test_a_texture_has_its_grain_and_fibres_one_direction(scans):
    """The mean frequency is one a grain, from every direction in cells and from one alone in fibres."""
    across, along = np.meshgrid(*[np.fft.fftfreq(scans.SIDE)] * 2)
    for grain in scans.GRAINS:
        for fibres in (False, True):
            texture = scans._texture(np.random.default_rng(7), grain, fibres=fibres)
            power = abs(np.fft.fft2(texture)) ** 2 / np.sum(abs(np.fft.fft2(texture)) ** 2)
            assert np.sum(power * np.hypot(across, along)) == pytest.approx(1 / grain, rel=0.3)
            one_direction = abs(np.sum(power * np.exp(2j * np.arctan2(along, across))))
            assert one_direction > 0.8 if fibres else one_direction < 0.5


def test_mean_and_deviation_are_those_of_the_form(scans):
    from learning_forms import FORMS

    images = np.stack([scans.scan(i, i % 10) for i in range(100)]) / 65535
    form = FORMS["evidence_scans"]
    assert images.mean() == pytest.approx(form["mean"][0], abs=0.02)
    assert images.std() == pytest.approx(form["std"][0], abs=0.02)


def test_the_files_are_read_back_and_made_once(scans, tmp_path):
    options = scans.Options(tmp_path, train=2, test=1, processes=1)
    scans.make(options)
    assert len(list(tmp_path.rglob("*.png"))) == 30
    path = tmp_path / "train" / "fibres-10" / "00001.png"
    assert np.array_equal(np.asarray(Image.open(path)), scans.scan(17, 7))
    before = path.stat().st_mtime_ns
    scans.make(options)
    assert path.stat().st_mtime_ns == before
