"""What every decoding backend does alike."""

from __future__ import annotations

import pytest
import torch

from tests.pipelines.building import build
from tests.pipelines.pictures import jpeg

each_backend = pytest.mark.parametrize(
    "backend", [pytest.param({}, id="torch"), pytest.param({"decode_on": "device"}, id="device_decode")]
)


@each_backend
def test_a_pipeline_tells_what_its_data_are(image_folder, tmp_path, backend):
    pipeline = build(image_folder(24, 3), batch_size=5, input_size=32, **backend)
    assert (len(pipeline), pipeline.num_samples, pipeline.num_classes) == (4, 24, 3)
    assert pipeline.classes == ["n0000", "n0001", "n0002"]
    assert pipeline.labels.tolist() == [i * 3 // 24 for i in range(24)]
    batch = next(pipeline.epoch(0))
    assert batch.labels.tolist() == [i * 3 // 24 for i in batch.ids.tolist()]
    pipeline.close()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(jpeg(0))
    unlabelled = build(tmp_path / "flat", batch_size=1, input_size=32, **backend)
    assert unlabelled.num_classes == 0
    assert unlabelled.labels is None
    assert next(unlabelled.epoch(0)).labels is None
    unlabelled.close()


@each_backend
def test_a_closed_pipeline_gives_no_epoch(image_folder, backend):
    pipeline = build(image_folder(), batch_size=6, input_size=32, **backend)
    pipeline.close()
    pipeline.close()
    with pytest.raises(RuntimeError, match="this pipeline was closed"):
        pipeline.epoch(0)


@each_backend
def test_an_error_that_nobody_expects_names_its_image(image_folder, monkeypatch, backend):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a mistake")

    pipeline = build(image_folder(4), batch_size=4, input_size=32, workers=1, **backend)
    monkeypatch.setattr("spark_fast.pipelines.transforms.crops.Augmentation.box", broken)
    first = next(iter(pipeline._sampler.epoch(0))).ids[0]
    with pytest.raises(RuntimeError, match=rf"while loading image {first} \(n000\d/000{first}.JPEG\).* mistake"):
        list(pipeline.epoch(0))
    pipeline.close()


@each_backend
def test_the_last_smaller_batch_has_its_place_in_the_buffers(image_folder, backend):
    pipeline = build(image_folder(9), batch_size=4, input_size=32, in_order=True, augment=False, **backend)
    got = list(pipeline.epoch(0))
    assert [batch.images.shape[0] for batch in got] == [4, 4, 1]
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in got)
    pipeline.close()
