"""Images in the device's memory: the batches of the product's pipeline, to rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast.errors import DataError, SettingsError
from spark_fast.evaluation.eval_settings import Knn
from spark_fast.pipelines import LoaderOptions, View, build_pipeline
from spark_fast.pipelines.sampler import uniform
from spark_fast.pipelines.transforms.crops import DRAWS, Augmentation, random_box
from tests.pipelines.comparing import pixels, same

HEIGHT, WIDTH, COUNT = 24, 30, 40
SIZE = (48, 64)
CROPS = View(scale=(0.3, 1.0))
CENTRES = View(augment=False, in_order=True, centre=0.8)


@pytest.fixture
def memory():
    import learning_memory

    return learning_memory


@pytest.fixture
def photographs(tmp_path):
    """Noise on a slope, in two classes: whatever is cropped, flipped or resized otherwise is seen."""
    random = np.random.default_rng(0)
    for i in range(COUNT):
        path = tmp_path / "photographs" / "train" / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        slope = np.linspace(0, 150, WIDTH)[:, None] + np.linspace(0, 60, HEIGHT)[:, None, None]
        noise = random.integers(0, 46, (HEIGHT, WIDTH, 3))
        Image.fromarray((slope + noise).astype(np.uint8)).save(path)
    return tmp_path / "photographs"


def opened(memory, path, view, batch=12, passes=1):
    """Images in memory as `Bench` opens them, and by the product."""
    settings = Knn()
    settings.data.input_size, settings.run.seed = f"{SIZE[0]}x{SIZE[1]}", 3
    place = memory.Memory(path.parent / "decoded", torch.device("cpu"))
    ours = place.open(settings, str(path), view, batch, passes)
    options = LoaderOptions(batch, "torch", input_size=SIZE, seed=3, view=view, worker_processes=0)
    return ours, build_pipeline(path, options)


def read(pipeline, epoch=0, start=0):
    try:
        return list(pipeline.epoch(epoch, start))
    finally:
        pipeline.close()


@pytest.mark.parametrize("view", [CROPS, CENTRES], ids=["crops and flips", "central crops in order"])
def test_an_epoch_is_the_one_of_the_products_pipeline(memory, photographs, view):
    ours, theirs = opened(memory, photographs, view)
    assert (len(ours), ours.num_classes, ours.classes) == (len(theirs), theirs.num_classes, theirs.classes)
    got, expected = read(ours, epoch=2), read(theirs, epoch=2)
    assert [len(batch.ids) for batch in got] == ([12, 12, 12] if view is CROPS else [12, 12, 12, 4])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.labels, b.labels)
        assert a.images.is_contiguous(memory_format=torch.channels_last)
        difference = np.abs(pixels(a.images) - pixels(b.images))
        assert difference.max() < 2.01, "both are bytes, and the product is as far from Pillow"
        assert (difference > 0.5).mean() < 0.02
    assert ours.bad_images.read == sum(len(batch.ids) for batch in got)


def test_half_of_the_crops_are_flipped(memory, photographs):
    ours, _ = opened(memory, photographs, CROPS)
    images = torch.cat([batch.images for batch in read(ours)])
    flipped = images[..., : SIZE[1] // 2].mean((1, 2, 3)) > images[..., SIZE[1] // 2 :].mean((1, 2, 3))  # the slope
    assert 0.25 * COUNT < flipped.sum() < 0.75 * COUNT


def test_a_batch_depends_on_epoch_and_step_alone(memory, photographs):
    whole = read(opened(memory, photographs, CROPS)[0], epoch=1)
    assert same(read(opened(memory, photographs, CROPS)[0], epoch=1, start=2), whole[2:])
    assert read(opened(memory, photographs, CROPS)[0], epoch=1, start=3) == []
    assert not torch.equal(read(opened(memory, photographs, CROPS)[0], epoch=0)[0].images, whole[0].images)


def test_an_epoch_may_be_several_passes(memory, photographs):
    single, thrice = opened(memory, photographs, CROPS)[0], opened(memory, photographs, CROPS, passes=3)[0]
    passes = [batch for epoch in (3, 4, 5) for batch in single.epoch(epoch)]
    assert len(thrice) == len(passes) == 9
    assert same(list(thrice.epoch(1)), passes)
    for start in (3, 7, 9):
        assert same(list(thrice.epoch(1, start)), passes[start:])


@pytest.mark.parametrize("scale", [(0.67, 1.0), (0.05, 0.1), (1.0, 1.0)])
def test_boxes_are_the_products(memory, scale):
    draws = uniform(0, 0, np.arange(5000), DRAWS)
    how = Augmentation(scale=scale)
    boxes = memory.random_boxes(draws, 32, 40, how)
    assert boxes.tolist() == [list(random_box(row.tolist(), 32, 40, how.scale, how.ratio)) for row in draws]
    fallback = (boxes == [0, 0, 32, 40]).all(1).mean()
    assert fallback > 0.05 if scale == (1.0, 1.0) else fallback < 0.05


def test_what_is_decoded_is_kept_for_other_processes(memory, photographs):
    before = read(opened(memory, photographs, CROPS)[0])
    for path in photographs.rglob("*.png"):
        path.write_bytes(b"no image any more")
    assert same(read(opened(memory, photographs, CROPS)[0]), before)


def replace(photographs, content):
    path = next(iter(sorted(photographs.rglob("*.png"))))
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    return path.name


def test_what_cannot_be_held_is_refused(memory, photographs):
    name = replace(photographs, b"no image")
    with pytest.raises(DataError, match=name):
        opened(memory, photographs, CROPS)
    replace(photographs, Image.new("RGB", (WIDTH, WIDTH)))
    with pytest.raises(DataError, match="these 2"):
        opened(memory, photographs, CROPS)
    assert not list(Path(photographs.parent / "decoded").glob("*.npy"))


def test_a_batch_of_more_images_than_there_are_is_refused(memory, photographs):
    with pytest.raises(DataError, match="41 is larger than the 40 images"):
        opened(memory, photographs, CROPS, batch=COUNT + 1)


def test_no_other_turns_are_known(memory, photographs):
    with pytest.raises(SettingsError, match="upside down"):
        opened(memory, photographs, View(vflip=True), batch=4)


def test_a_closed_pipeline_gives_nothing(memory, photographs):
    ours, theirs = opened(memory, photographs, CROPS)
    theirs.close()
    ours.close()
    with pytest.raises(RuntimeError, match="closed"):
        ours.epoch(0)
