"""The command: which patches are hidden is the mask's doing, and wrong input is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast import build_spark
from spark_fast.cli import reconstruct
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.reporting.reconstructions import LINE
from spark_fast.training.settings import Settings
from spark_fast.weights.timm_keys import encoder_state_dict, write_encoder
from tests.pipelines.bands import bands, npy_of, png_of

pytestmark = pytest.mark.usefixtures("one_thread")
PAD = 4
TOP = 2 * PAD + 3 * LINE  # above the pictures: a heading of a line, titles of two
NOTE = 2 * LINE + PAD  # below them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of ours (4x4 patches), its encoder alone, and two pictures."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    settings = Settings()
    settings.model.model, settings.data.input_size, settings.model.decoder_width = "resnet10t", "128", 32
    settings.model.mask_ratio = 0.5
    model = build_spark("resnet10t", input_size=128, mask_ratio=0.5, decoder_width=32)
    torch.save({"model": model.state_dict(), "settings": settings.to_dict()}, folder / "ckpt.pth")
    write_encoder(encoder_state_dict(model, "resnet10t"), "resnet10t", folder)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    Image.fromarray(noise[::-1]).resize((200, 140)).save(folder / "b.jpg")
    return folder


def draw(folder, *words, code=0):
    assert reconstruct.main([str(w) for w in words]) == code


def hidden(path, row=0, patch=32, size=128):
    """(h, w) bool: the grey patches of the middle column."""
    picture = np.asarray(Image.open(path)).astype(int)
    top, left = TOP + PAD + row * (size + PAD), PAD + (size + PAD)
    visible = picture[top : top + size, left : left + size]
    return (visible == 128).all(-1).reshape(size // patch, patch, size // patch, patch).all((1, 3))


def test_an_image_a_row_half_of_the_patches_hidden_as_in_training(folder, tmp_path, capsys):
    draw(folder, folder / "ckpt.pth", folder / "a.png", folder / "b.jpg", "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (3 * (128 + PAD) + PAD, TOP + 2 * (128 + PAD) + PAD + NOTE)
    assert [hidden(tmp_path / "grid.png", row).sum() for row in (0, 1)] == [8, 8]
    assert "2 images, input, what the network sees, prediction, by resnet10t on 4x4 patches" in capsys.readouterr().out
    original = np.asarray(Image.open(folder / "a.png")).astype(int)
    drawn = np.asarray(Image.open(tmp_path / "grid.png"))
    assert abs(drawn[TOP + PAD : TOP + PAD + 128, PAD : PAD + 128] - original).max() <= 1


def test_ratio_and_seed_choose_the_mask(folder, tmp_path):
    found = []
    for i, words in enumerate(([], ["--seed=0"], ["--seed=5"])):
        draw(folder, folder / "ckpt.pth", folder / "a.png", "--out", tmp_path / f"{i}.png", "--mask_ratio=0.75", *words)
        found.append(hidden(tmp_path / f"{i}.png"))
    assert all(mask.sum() == 12 for mask in found)
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize("kind", ["rows", "text", "picture"])
def test_a_mask_of_your_own_hides_just_those_patches_of_every_image(folder, tmp_path, kind):
    rows = [".##.", "....", "####", "...#"]
    (tmp_path / "mask.txt").write_text("\n".join(rows) + "\n")
    Image.fromarray(np.kron([[255 * (c == ".") for c in row] for row in rows], np.ones((8, 8))).astype(np.uint8)).save(
        tmp_path / "mask.png"
    )
    words = {"rows": rows, "text": [tmp_path / "mask.txt"], "picture": [tmp_path / "mask.png"]}[kind]
    out = tmp_path / "grid.png"
    draw(folder, folder / "ckpt.pth", folder / "a.png", folder / "b.jpg", "--out", out, "--mask", *words)
    expected = np.array([[c == "#" for c in row] for row in rows])
    assert (hidden(out, 0) == expected).all()
    assert (hidden(out, 1) == expected).all()


def test_another_input_size_gives_another_grid(folder, tmp_path):
    words = [folder / "ckpt.pth", folder / "a.png", "--out", tmp_path / "grid.png", "--input_size", "64x96"]
    draw(folder, *words)
    assert Image.open(tmp_path / "grid.png").size == (
        2 * (3 * (96 + PAD) + PAD),
        TOP - LINE + 2 * (64 + 2 * PAD) + NOTE,
    )


@pytest.fixture
def pictures(tmp_path):
    """Five images in two class folders, two pairs of them of one stem, and files that are none of them."""
    image = Image.new("RGB", (40, 30), "red")
    for name in ("cat/1.png", "cat/2.png", "dog/1.jpg", "dog/1.png", "dog/deep/3.webp"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (tmp_path / "pictures" / ".ipynb_checkpoints").mkdir()
    image.save(tmp_path / "pictures" / ".ipynb_checkpoints" / "1.png")
    (tmp_path / "pictures" / "notes.txt").write_text("of the cats")
    return tmp_path / "pictures"


def test_of_a_folder_every_image_is_a_row_or_as_many_as_asked_for(folder, pictures, tmp_path, capsys):
    for count, rows in ((0, 5), (2, 2)):
        out = tmp_path / f"{count}.png"
        draw(folder, folder / "ckpt.pth", pictures, folder / "a.png", "--out", out, "--count", count)
        assert Image.open(out).height == TOP + (rows + 1) * (128 + PAD) + PAD + NOTE
        said = capsys.readouterr().out
        assert f"{rows + 1} images" in said
        assert (f"2 of the 5 images in {pictures} are drawn" in said) == (count == 2)


def test_a_folder_to_write_into_gets_a_picture_of_each_image_and_none_replaces_another(
    folder, pictures, tmp_path, capsys
):
    out, words = tmp_path / "drawn", [folder / "ckpt.pth", pictures, "--out", tmp_path / "drawn"]
    draw(folder, *words)
    assert sorted(p.name for p in out.iterdir()) == ["1-2.png", "1-3.png", "1.png", "2.png", "3.png"]
    assert hidden(out / "1-3.png").sum() == 8
    draw(folder, *words, code=2)
    assert f"{out}/1.png already exists: choose another --out, or --overwrite to replace it" in capsys.readouterr().err
    draw(folder, *words, "--overwrite")
    draw(folder, folder / "ckpt.pth", pictures / "cat", "--out", pictures / "cat", "--overwrite", code=2)
    assert "1.png is one of the images" in capsys.readouterr().err
    assert Image.open(pictures / "cat" / "1.png").size == (40, 30)


def test_an_image_of_a_folder_that_cannot_be_read_is_left_out_and_named(folder, pictures, tmp_path, capsys):
    (pictures / "cat" / "2.png").write_bytes(b"no picture")
    draw(folder, folder / "ckpt.pth", pictures, "--out", tmp_path / "grid.png")
    said = capsys.readouterr().out
    assert f"left out: {pictures}/cat/2.png cannot be read" in said
    assert "grid.png: 4 images" in said
    draw(folder, folder / "ckpt.pth", pictures / "cat" / "2.png", "--out", tmp_path / "other.png", code=3)
    (pictures / "cat" / "1.png").write_bytes(b"")
    draw(folder, folder / "ckpt.pth", pictures / "cat", "--out", tmp_path / "other.png", code=3)
    assert "none of the images can be read" in capsys.readouterr().err


def test_more_images_than_the_network_is_given_at_once_are_drawn_as_each_alone(folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "AT_ONCE", 2)
    draw(folder, folder / "ckpt.pth", pictures, "--out", tmp_path / "few.png")
    monkeypatch.setattr(reconstruct, "AT_ONCE", 16)
    draw(folder, folder / "ckpt.pth", pictures, "--out", tmp_path / "all.png")
    few, whole = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("few", "all"))
    assert abs(few - whole).max() <= 1
    masks = [tuple(hidden(tmp_path / "few.png", row).flatten()) for row in range(5)]
    assert len(set(masks)) == 5, "each image has its own mask"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["ckpt.pth", "a.png", "--mask", "##..", "..##"],
            2,
            "must have 4 rows of 4 characters, one per patch; it has 2",
        ),
        (["ckpt.pth", "a.png", "--mask", "##..", "..##", "....", "..x."], 2, "not x"),
        (["ckpt.pth", "a.png", "--mask", "....", "....", "....", "...."], 2, "the mask hides no patch"),
        (["ckpt.pth", "a.png", "--mask", "####", "####", "####", "####"], 2, "the mask hides every patch"),
        (["ckpt.pth", "a.png", "--mask", "odd.png"], 2, "odd.png is 10x10 pixels: the mask needs 4x4, or a multiple"),
        (["ckpt.pth", "a.png", "--mask", "no.txt"], 2, "there is no mask file no.txt"),
        (["ckpt.pth", "a.png", "--mask", "odd.png", "--mask_ratio", "0.5"], 2, "choose one of them"),
        (["ckpt.pth", "a.png", "--mask_ratio", "1.5"], 2, "mask ratio must be between 0 and 1"),
        (["ckpt.pth", "a.png", "--mask_ratio", "0.99"], 2, "no patch visible"),
        (["ckpt.pth", "a.png", "--input_size", "100"], 2, "not a multiple of the patch"),
        (["ckpt.pth", "a.png", "--out", "grid.jpg"], 2, "must end with .png"),
        (["ckpt.pth", "a.png", "--out", "odd.png"], 2, "odd.png already exists: choose another --out"),
        (["ckpt.pth", "a.png", "--out", "a.png", "--overwrite"], 2, "a.png is one of the images"),
        (["ckpt.pth", "a.png", "--count", "-1"], 2, "--count must be a number of images, or 0 for all, got -1"),
        (["ckpt.pth", "empty"], 3, "there are no images in empty"),
        (["ckpt.pth", "no.png"], 3, "no.png cannot be read"),
        (["ckpt.pth", "ckpt.pth"], 3, "ckpt.pth cannot be read: not a readable image"),
        (["a.png", "a.png"], 6, "a.png cannot be read"),
        (["resnet10t_timm.safetensors", "a.png"], 6, "nothing can be reconstructed without the decoder"),
        (["ckpt.pth", "a.png", "--out", "no/grid.png"], 6, "no/grid.png"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_input_is_named_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    Image.new("L", (10, 10)).save(tmp_path / "odd.png")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    draw(folder, *([] if "--out" in words else ["--out", "grid.png"]), *words, code=code)
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_channels_that_are_drawn_may_be_chosen(folder, tmp_path, capsys):
    images = [folder / "ckpt.pth", folder / "a.png"]
    draw(folder, *images, "--out", tmp_path / "rgb.png")
    draw(folder, *images, "--out", tmp_path / "grey.png", "--picture_channels", "1")
    rgb, grey = (np.asarray(Image.open(tmp_path / name)) for name in ("rgb.png", "grey.png"))
    assert np.array_equal(grey, np.repeat(rgb[..., 1:2], 3, 2))
    draw(folder, *images, "--out", tmp_path / "x.png", "--picture_channels", "3", code=2)
    assert "--picture_channels must be one or three of the channels 0 to 2, got 3" in capsys.readouterr().err


BANDS = Statistics("percentile", "uint16", (0.4,) * 4, (0.2,) * 4, (1000.0,) * 4, (40000.0,) * 4)


def run_of(path, in_chans, statistics=None):
    """A checkpoint of a run on images of so many channels, 2x2 patches."""
    settings = Settings()
    settings.model.model, settings.data.input_size, settings.data.in_chans = "test_resnet", "64", in_chans
    settings.model.decoder_width = 32
    torch.manual_seed(0)
    model = build_spark("test_resnet", input_size=64, decoder_width=32, in_chans=in_chans, check=False)
    known = {"statistics": statistics.to_dict()} if statistics else {}
    torch.save({"model": model.state_dict(), "settings": settings.to_dict(), **known}, path)
    return path


def input_of(picture, size=64):
    """The first column of the first row, (size, size, 3); pictures of this size are twice as large."""
    pixels = np.asarray(Image.open(picture)).astype(int)[TOP:, :][::2, ::2]
    return pixels[PAD : PAD + size, PAD : PAD + size]


def test_images_of_any_channels_are_drawn_as_the_run_reads_them(tmp_path):
    run = run_of(tmp_path / "four.pth", 4, BANDS)
    pixels = bands(0, 64, 64, 4)
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "a.npy").write_bytes(npy_of(pixels))
    (tmp_path / "first.npy").write_bytes(npy_of(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
    draw(tmp_path, run, tmp_path / "arrays", "--out", tmp_path / "rgb.png")
    draw(tmp_path, run, tmp_path / "first.npy", "--channels_first", "--out", tmp_path / "first.png")
    assert (input_of(tmp_path / "first.png") == input_of(tmp_path / "rgb.png")).all()
    seen = pixels.clip(1000, 40000).astype(float)  # as --scale percentile cuts them off
    low, high = (np.sort(seen.reshape(-1, 4), 0)[k] for k in (40, -41))
    shown = 255 * ((seen - low) / (high - low)).clip(0, 1)
    assert abs(input_of(tmp_path / "rgb.png") - shown[:, :, :3]).max() <= 1
    draw(tmp_path, run, tmp_path / "arrays", "--out", tmp_path / "grey.png", "--picture_channels", "3")
    assert abs(input_of(tmp_path / "grey.png") - shown[:, :, 3:]).max() <= 1


def test_three_channels_that_a_run_scaled_are_read_with_all_their_bits(tmp_path):
    three = Statistics("dtype", "uint16", (0.5,) * 3, (0.2,) * 3, (0.0,) * 3, (65535.0,) * 3)
    run, pixels = (
        run_of(tmp_path / "three.pth", 3, three),
        (bands(0, 64, 64, 3) >> 8) + 5000,
    )  # of 8 bits, nothing is left
    (tmp_path / "a.png").write_bytes(png_of(pixels))
    draw(tmp_path, run, tmp_path / "a.png", "--out", tmp_path / "x.png")
    low, high = (np.sort(pixels.reshape(-1, 3), 0)[k].astype(float) for k in (40, -41))
    assert abs(input_of(tmp_path / "x.png") - 255 * ((pixels - low) / (high - low)).clip(0, 1)).max() <= 1


def test_images_that_are_not_the_runs_are_named_with_the_reason(folder, tmp_path, capsys):
    draw(folder, run_of(tmp_path / "four.pth", 4, BANDS), folder / "a.png", "--out", tmp_path / "x.png", code=3)
    assert "a.png cannot be read: it has 3 channels where --in_chans is 4" in capsys.readouterr().err
    draw(folder, run_of(tmp_path / "none.pth", 4), folder / "a.png", "--out", tmp_path / "x.png", code=2)
    assert "in_chans 4, but has no mean and standard deviation to normalise them" in capsys.readouterr().err
    draw(folder, folder / "ckpt.pth", folder / "a.png", "--npz_key=a", "--out", tmp_path / "x.png", code=2)
    assert "ckpt.pth is for photographs: --channels_first and --npz_key are for arrays" in capsys.readouterr().err
