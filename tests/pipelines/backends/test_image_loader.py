"""An image's way into a batch, in each form that a batch may have, and past an image that cannot be read."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from spark_fast.errors import DataError
from spark_fast.pipelines.backends.image_loader import ImageLoader
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.sources.bad_images import SUBSTITUTES, Loaded
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.transforms.crops import DRAWS, Augmentation
from spark_fast.pipelines.transforms.decode import decode_image
from spark_fast.pipelines.transforms.device_augment import DeviceAugment
from spark_fast.pipelines.transforms.resize import Normalise
from tests.pipelines.building import build
from tests.pipelines.pictures import jpeg
from tests.pipelines.transforms.test_jpeg import swallowed_bad_code


def test_when_nothing_near_is_readable_it_is_said_and_of_files_that_are_gone_the_storage_is_questioned(tmp_path):
    for i in range(SUBSTITUTES + 4):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"broken" if i <= SUBSTITUTES else jpeg(i))
    source = detect_source(tmp_path)
    loader, out = ImageLoader(source, Augmentation((32, 32))), torch.empty(32, 32, 3, dtype=torch.uint8)
    draws = [0.5] * DRAWS
    with pytest.raises(DataError, match=r"image 0 \(00.jpg\) cannot be read \(not a .*neither can the 16"):
        loader.load(0, draws, out)
    assert loader.load(1, draws, out).substituted
    assert loader.load(len(source) - 1, draws, out).substituted is None
    pipeline = build(tmp_path, batch_size=20, input_size=32)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="is the storage still available"):
        list(pipeline.epoch(0))
    pipeline.close()


def test_what_has_been_judged_is_known_to_forked_processes_and_not_sent_to_others(image_folder):
    loader = ImageLoader(detect_source(image_folder(6)), Augmentation((32, 32)))
    loader.judged[1] = True
    copy = pickle.loads(pickle.dumps(loader))
    assert not copy.judged.any()
    assert (copy.augmentation, len(copy.source)) == (loader.augmentation, 6)
    if not (child := os.fork()):
        loader.judged[4] = True
        os._exit(0)
    os.waitpid(child, 0)
    assert loader.judged.tolist() == [False, True, False, False, True, False]


def test_a_vanished_image_is_replaced(image_folder):
    source = detect_source(image_folder())
    vanished = source.root / source.name(4)
    vanished.unlink()
    out = torch.empty(32, 32, 3, dtype=torch.uint8)
    loaded = ImageLoader(source, Augmentation((32, 32))).load(4, [0.5] * DRAWS, out)
    assert "No such file" in (loaded.substituted or "")


def test_an_images_first_reading_is_the_strictest_unless_it_was_judged_at_conversion(tmp_path, image_folder):
    root, draws, out = image_folder(3, 1), [0.5] * DRAWS, torch.empty(32, 32, 3, dtype=torch.uint8)
    (root / "train" / "n0000" / "0001.JPEG").write_bytes(swallowed_bad_code())
    source = detect_source(root)
    loader = ImageLoader(source, Augmentation((32, 32)))
    assert loader.load(0, draws, out).substituted is None
    assert "bad Huffman code" in (loader.load(1, draws, out).substituted or "")  # 2 stands in
    assert loader.judged.tolist() == [True, False, True]
    convert(root, tmp_path / "shards", ConvertSettings())
    assert ImageLoader(detect_source(tmp_path / "shards"), Augmentation((32, 32))).judged.tolist() == [True, True]


@pytest.mark.parametrize("flips", [0.1, 0.9])
def test_a_batch_holds_bytes_normalised_pixels_or_cells_of_the_same_crop(image_folder, flips):
    source, augmentation = detect_source(image_folder()), Augmentation((32, 48))
    draws = [0.3] * (DRAWS - 1) + [flips]
    pixels = torch.empty(32, 48, 3, dtype=torch.uint8)
    assert ImageLoader(source, augmentation).load(5, draws, pixels) == Loaded(converted=False, substituted=None)

    normalise, normalised = Normalise(48, torch.device("cpu"), torch.float32), torch.empty(32, 48, 3)
    ImageLoader(source, augmentation, normalise).load(5, draws, normalised)
    assert torch.equal(normalised, normalise(pixels[None])[0].permute(1, 2, 0))

    device_augment = DeviceAugment((32, 48), torch.device("cpu"), torch.float32)
    cell, crop = torch.zeros(*device_augment.cell, 3, dtype=torch.uint8), torch.empty(3, dtype=torch.int64)
    ImageLoader(source, augmentation, device_augment=device_augment).load(5, draws, cell, crop)
    image = decode_image(source.read(5)).pixels
    box = augmentation.box(draws, *image.shape[:2])
    assert crop.tolist() == [box.height, box.width, flips < 0.5]
    top, left, height, width = box
    assert (cell[:height, :width].numpy() == image[top : top + height, left : left + width]).all()
