"""The command: which patches are hidden is the mask's doing, and wrong input is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast import build_spark
from spark_fast.cli import reconstruct
from spark_fast.training.settings import Settings
from spark_fast.weights.timm_keys import encoder_state_dict, write_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
PAD = 4


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
    top, left = PAD + row * (size + PAD), PAD + (size + PAD)
    visible = picture[top : top + size, left : left + size]
    return (visible == 128).all(-1).reshape(size // patch, patch, size // patch, patch).all((1, 3))


def test_an_image_a_row_half_of_the_patches_hidden_as_in_training(folder, tmp_path, capsys):
    draw(folder, folder / "ckpt.pth", folder / "a.png", folder / "b.jpg", "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (3 * (128 + PAD) + PAD, 2 * (128 + PAD) + PAD)
    assert [hidden(tmp_path / "grid.png", row).sum() for row in (0, 1)] == [8, 8]
    assert "2 images, input, visible part, reconstruction, by resnet10t on 4x4 patches" in capsys.readouterr().out
    original = np.asarray(Image.open(folder / "a.png")).astype(int)
    assert abs(np.asarray(Image.open(tmp_path / "grid.png"))[PAD : PAD + 128, PAD : PAD + 128] - original).max() <= 1


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
    assert Image.open(tmp_path / "grid.png").size == (3 * (96 + PAD) + PAD, 64 + 2 * PAD)


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
    before = sorted(tmp_path.rglob("*"))
    draw(folder, *([] if "--out" in words else ["--out", "grid.png"]), *words, code=code)
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
