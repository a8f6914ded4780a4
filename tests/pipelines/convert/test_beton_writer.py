"""The converter's .beton: FFCV's own reader agrees, bytes are reproducible, damage is found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines.convert.beton_writer import BetonSettings
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.convert.verify_shards import verify_shards
from spark_fast.pipelines.sources.beton import BetonSource
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import BETON, read_manifest
from spark_fast.pipelines.transforms.decode import decode_image
from tests.pipelines.comparing import batches, same
from tests.pipelines.convert.test_conversion import contents
from tests.pipelines.damage import flip
from tests.pipelines.pictures import jpeg

KEEP_SIZE = ConvertSettings(Reencode(short_side=0), images_per_shard=10)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(SettingsError, match=r"ffcv_raw must be from 0"):
        BetonSettings(share)


def test_without_ffcv_the_converter_gives_the_command_that_installs_it(image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(SettingsError, match="needs FFCV") as caught:
        convert(image_folder(), tmp_path / "out", KEEP_SIZE, beton=BetonSettings())
    assert str(caught.value).endswith(
        "\n  apt-get install -y --no-install-recommends libturbojpeg0-dev libopencv-dev pkg-config"
        " && pip install 'spark-fast[ffcv]'"
    )


@pytest.mark.ffcv
def test_records_are_the_shards_bytes_or_their_pixels(beton_folder):
    folder = beton_folder()
    beton, shards = BetonSource(folder / BETON), detect_source(folder)
    assert len(beton) == len(shards) == 24
    assert beton.fingerprint() == shards.fingerprint()
    assert beton.labels.tolist() == shards.labels.tolist()
    raw = beton.checks["mode"] == 1
    assert 0 < raw.sum() < 24
    for i in range(24):
        assert (decode_image(beton.read(i)).pixels == decode_image(shards.read(i)).pixels).all()
        if not raw[i]:
            assert beton.read(i) == shards.read(i)  # copied, not encoded again
    assert verify_shards(folder) == []
    beton.close()


@pytest.mark.ffcv
def test_ffcvs_own_loader_reads_every_record(beton_folder):
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption

    folder = beton_folder()
    loader = Loader(
        str(folder / BETON), batch_size=24, num_workers=1, order=OrderOption.SEQUENTIAL,
        pipelines={"image": [CenterCropRGBImageDecoder((32, 32), 1.0)], "label": [IntDecoder()]},
    )  # fmt: skip
    ((images, labels),) = list(loader)
    assert labels[:, 0].tolist() == detect_source(folder).labels.tolist()
    assert images.mean((1, 2, 3)).min() > 20  # none is black


@pytest.mark.ffcv
@pytest.mark.parametrize("raw", [0, 0.5, 1])
def test_the_number_of_processes_does_not_change_a_byte(image_folder, tmp_path, raw):
    root = image_folder()
    for name, workers in (("one", 1), ("three", 3)):
        convert(root, tmp_path / name, KEEP_SIZE, workers=workers, beton=BetonSettings(raw))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert (BetonSource(tmp_path / "one" / "train" / BETON).checks["mode"] == 1).mean() == pytest.approx(raw, abs=0.3)


@pytest.mark.ffcv
def test_alone_it_leaves_no_shards_and_is_read_by_the_default_pipeline_too(image_folder, beton_folder):
    root = image_folder()
    folder = beton_folder(root, raw=0, alone=True)
    assert names(folder) == [BETON, BETON + ".npy", "manifest.json"]
    assert verify_shards(folder) == []
    assert same(batches(folder), batches(root))
    assert same(batches(folder / BETON), batches(root))


@pytest.mark.ffcv
def test_the_same_command_again_changes_nothing_and_another_format_of_one_alone_is_refused(image_folder, tmp_path):
    root, out = image_folder(), tmp_path / "out"
    made = [convert(root, out, KEEP_SIZE, beton=BetonSettings(0.5)) for _ in range(2)]
    assert made[0] == made[1]
    convert(root, out, KEEP_SIZE, beton=BetonSettings(0.25))  # made anew from the shards
    assert read_manifest(out / "train").beton.raw == 0.25
    convert(root, out, KEEP_SIZE)  # the shards are all there
    assert read_manifest(out / "train").beton.raw == 0.25
    with pytest.raises(SettingsError, match="holds shards, which --format ffcv would delete"):
        convert(root, out, KEEP_SIZE, beton=BetonSettings(0.25, alone=True))
    assert len(list((out / "train").glob("shard-*.tar"))) > 0
    before = convert(root, out, KEEP_SIZE, beton=BetonSettings(0.25, alone=True), overwrite=True)
    assert not list((out / "train").glob("shard-*"))
    assert convert(root, out, KEEP_SIZE, beton=BetonSettings(0.25, alone=True)) == before
    for other in (None, BetonSettings(0.25), BetonSettings(0.5, alone=True)):
        with pytest.raises(SettingsError, match=r"holds only a \.beton"):
            convert(root, out, KEEP_SIZE, beton=other)
    (out / "train" / BETON).unlink()
    with pytest.raises(SettingsError, match="incomplete"):
        convert(root, out, KEEP_SIZE, beton=BetonSettings(0.25, alone=True))
    assert convert(root, out, KEEP_SIZE, beton=BetonSettings(0.25, alone=True), overwrite=True) == before


@pytest.mark.ffcv
def test_shards_asked_for_since_a_beton_alone_was_stopped_are_kept(image_folder, tmp_path, monkeypatch):
    root, out, alone = image_folder(), tmp_path / "out", BetonSettings(alone=True)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spark_fast.pipelines.convert.beton_writer._write", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(root, out, KEEP_SIZE, beton=alone)
    convert(root, out, KEEP_SIZE)
    with pytest.raises(SettingsError, match="holds shards"):
        convert(root, out, KEEP_SIZE, beton=alone)
    assert list((out / "train").glob("shard-*.tar"))


@pytest.mark.ffcv
def test_unlabelled_images_stay_unlabelled(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(jpeg(i))
    convert(tmp_path / "in", tmp_path / "out", KEEP_SIZE, beton=BetonSettings(alone=True))
    assert detect_source(tmp_path / "out").labels is None


@pytest.mark.ffcv
def test_a_record_larger_than_ffcvs_page_gets_larger_pages(image_folder, beton_folder):
    root = image_folder(6)
    (root / "train" / "n0000" / "0000.JPEG").write_bytes(jpeg(0, 1500, 2000))  # 9 MB raw, more than 8 MiB
    folder = beton_folder(root, raw=1)
    assert verify_shards(folder) == []
    assert len(batches(folder, pipeline="ffcv")) == 1


@pytest.mark.ffcv
def test_a_damaged_shard_makes_no_beton(image_folder, tmp_path):
    convert(image_folder(), tmp_path / "out", KEEP_SIZE)
    folder = tmp_path / "out" / "train"
    flip(folder / "shard-000000.tar", 700)
    with pytest.raises(DataError, match=r"shard-000000.tar:.*checksum differs"):
        convert(tmp_path / "images", tmp_path / "out", KEEP_SIZE, beton=BetonSettings())
    assert not [name for name in names(folder) if "beton" in name]
