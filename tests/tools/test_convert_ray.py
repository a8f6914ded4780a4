"""The Ray driver, on a Ray that is started here: parts, then the merge."""

import pytest
from PIL import Image

from spark_fast.pipelines.sources.shard_format import read_manifest

pytestmark = pytest.mark.ray


def test_the_parts_are_converted_and_merged(tmp_path):
    ray = pytest.importorskip("ray")
    from tools import convert_ray

    (tmp_path / "in").mkdir()
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 90, 10)).save(tmp_path / "in" / f"{i}.jpg")
    try:
        words = [str(tmp_path / "in"), str(tmp_path / "out"), "--parts=2", "--cpus=1", "--workers=1"]
        assert convert_ray.main([*words, "--images_per_shard=3"]) == 0
    finally:
        ray.shutdown()
    folder = next(path.parent for path in (tmp_path / "out").rglob("manifest.json"))
    assert read_manifest(folder).count == 6
