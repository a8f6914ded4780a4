"""The command: from a run, and from published files, to what timm, torchvision and the published code load strictly."""

import json
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spark_fast import build_spark, load_spark_state_dict
from spark_fast.cli import eval as evaluate
from spark_fast.cli import export, reconstruct, train
from spark_fast.weights.load import load_weights
from spark_fast.weights.spark_keys import spark_state_dict
from tests.cli.conftest import write_pictures
from tests.commands import run_here

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 2 epochs of 2 steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    pictures = folder.parent / "pictures" / "train" / "a"
    pictures.mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (70, 70), (30 * i, 90, 200 - 20 * i)).save(pictures / f"{i}.jpg")
    flags = [f"--data_path={folder.parent / 'pictures'}", "--model=resnet10t", "--input_size=64", "--mask=0.5"]
    flags += ["--decoder_width=32", "--bs=4", "--ep=2", "--wp_ep=1", "--threads=1", "--workers=1", "--log_every=1"]
    run_here(train.main, "name", f"--exp_dir={folder}", *flags)
    return folder


@pytest.fixture(scope="module", params=["resnet18", pytest.param("convnext_tiny", marks=pytest.mark.slow)])
def published(request, golden, tmp_path_factory):
    """(name, state, folder): the two files of the published code, made from the recorded figures."""
    figures, _, state = golden(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    whole = {"arch": figures["model"], "input_size": figures["input_size"], "args": "", "epoch": 3, "is_pretrain": True}
    wrapped = {f"module.{k}": v for k, v in state.items()} | {"config": {"mask_ratio": 0.7}}
    torch.save({**whole, "module": wrapped}, folder / "x_withdecoder_1kpretrained_spark_style.pth")
    prefix = "sparse_encoder.sp_cnn."
    encoder = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    torch.save(encoder, folder / "x_1kpretrained_timm_style.pth")
    return request.param, state, folder


@pytest.fixture(scope="module")
def exported(published):
    """For timm, from the file with a decoder; and what the command printed."""
    folder = published[2]
    source, out = folder / "x_withdecoder_1kpretrained_spark_style.pth", folder / "exported" / "timm.safetensors"
    out.parent.mkdir()
    with redirect_stdout(StringIO()) as printed:
        run_export(source, "--to", "timm", "--out", out)
    return out, printed.getvalue()


def weights_of(run):
    return torch.load(run / "ckpt-last.pth", weights_only=True)["model"]


def run_export(*words, code=0):
    assert export.main([str(w) for w in words]) == code


@pytest.mark.slow
def test_your_own_network_is_found_in_the_folder_where_the_command_is_run(run, tmp_path, monkeypatch):
    code = "import timm\n\ndef make(**kwargs):\n    return timm.create_model('resnet10t', features_only=True)\n"
    (tmp_path / "own_here.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    path = [entry for entry in sys.path if entry]  # "" is the current folder
    flags = [f"--data_path={run.parent / 'pictures'}", "--input_size=64", "--mask=0.5", "--decoder_width=32"]
    flags += ["--bs=4", "--ep=1", "--wp_ep=0", "--threads=1", "--workers=1", "--exp_dir=own", "--verify=never"]
    for main, words in (
        (train.main, ["name", "--model=own_here:make", *flags]),
        (export.main, ["own", "--model=own_here:make", "--to=safetensors", "--out=own.safetensors"]),
    ):
        monkeypatch.setattr(sys, "path", list(path))
        sys.modules.pop("own_here", None)
        run_here(main, *words)
    assert "layer1.0.conv1.weight" in load_file(tmp_path / "own.safetensors")


def sums(tensors):
    return sorted(v.double().sum().item() for v in tensors)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_published_checkpoint_is_imported_exported_and_strictly_loaded(published, exported):
    name, state, _ = published
    file, printed = exported
    loaded = timm.create_model(name, num_classes=0, checkpoint_path=str(file)).state_dict()
    trained = [v for k, v in state.items() if k.startswith("sparse_encoder.")]
    convnext = name.startswith("convnext")
    first, official = ("stem.0", "downsample_layers.0.0") if convnext else ("conv1", "conv1")
    assert torch.equal(loaded[f"{first}.weight"], state[f"sparse_encoder.sp_cnn.{official}.weight"])
    new = ["head.norm.weight", "head.norm.bias"] if convnext else []
    assert len(loaded) == len(trained) + len(new)
    assert sums(v for k, v in loaded.items() if k not in new) == sums(trained)
    assert ("not pre-trained, at their initial values: head.norm.weight, head.norm.bias" in printed) == convnext


def test_a_published_checkpoint_goes_the_whole_way_to_a_fine_tuned_network(published, exported, tmp_path):
    """Imported, reconstructed, exported, strictly loaded by timm (the test above), fine-tuned for an epoch."""
    name, _, folder = published
    write_pictures(tmp_path / "pictures" / "train", 8, 0)
    write_pictures(tmp_path / "pictures" / "val", 4, 1)
    image = next((tmp_path / "pictures").rglob("*.JPEG"))
    source = folder / "x_withdecoder_1kpretrained_spark_style.pth"
    assert reconstruct.main([str(w) for w in (source, image, "--out", tmp_path / "grid.png", "--seed", 1)]) == 0
    assert Image.open(tmp_path / "grid.png").size == (3 * 132 + 4, 59 + 132 + 4 + 38), "with titles and note"
    words = [f"--weights={exported[0]}", f"--model={name}", f"--data_path={tmp_path / 'pictures'}", "--input_size=32"]
    words += ["--bs=4", "--ep=1", "--wp_ep=0", "--ema=0", "--opt=sgd", "--workers=1", "--threads=1"]
    done = run_here(evaluate.main, "finetune", *words, f"--exp_dir={tmp_path / 'run'}")
    assert (
        "these keep their initial values: " + ("head" if name.startswith("convnext") else "fc.bias, fc.weight")
        in done.stderr
    )
    tuned = load_file(tmp_path / "run" / f"{name}_timm.safetensors")
    timm.create_model(name, num_classes=4).load_state_dict(tuned)
    before = load_file(exported[0])
    assert sum(not torch.equal(tuned[k], before[k]) for k in tuned if k in before) > 20
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epoch"] == 1


def test_the_file_with_a_decoder_comes_back_as_the_published_notebook_reads_it(published, tmp_path):
    """By the rules of viz_reconstruction.ipynb and of SparK.load_state_dict(strict=True), both in pretrain/."""
    name, state, folder = published
    run_export(folder / "x_withdecoder_1kpretrained_spark_style.pth", "--to", "spark", "--out", tmp_path / "back.pth")
    whole = torch.load(tmp_path / "back.pth", weights_only=True)
    unused = {"imn_m": (1, 3, 1, 1), "imn_s": (1, 3, 1, 1), "norm_black": (1, 3, 128, 128)}
    assert (whole["input_size"], whole["arch"], whole["is_pretrain"]) == (128, name, True)
    module = whole["module"]
    config = module.pop("config")
    assert config == {
        "mask_ratio": 0.7,
        "densify_norm_str": "ln" if name.startswith("convnext") else "bn",
        "sbn": False,
        "hierarchy": 4,
        "sparse_encoder.input_size": 128,
        "dense_decoder.width": 64,
    }
    assert {k: tuple(v.shape) for k, v in module.items() if k in unused} == unused
    assert equal({k: v for k, v in module.items() if k not in unused}, state)


@pytest.mark.slow
def test_the_published_fine_tuning_is_stopped_by_the_whole_file_and_takes_all_of_the_encoders(published, tmp_path):
    """The rules of `load_checkpoint` in downstream_imagenet/util.py: not strict, so names decide what is taken."""
    name, _, folder = published
    for form in ("spark", "spark_encoder"):
        source = folder / "x_withdecoder_1kpretrained_spark_style.pth"
        run_export(source, "--to", form, "--out", tmp_path / f"{form}.pth")
    assert torch.load(tmp_path / "spark.pth", weights_only=True).get("is_pretrain", False)
    found = torch.load(tmp_path / "spark_encoder.pth", weights_only=True)
    assert not found.get("is_pretrain", False)
    assert equal(found.get("module", found), torch.load(folder / "x_1kpretrained_timm_style.pth", weights_only=True))
    assert len(found) == {"resnet18": 120, "convnext_tiny": 178}[name]


@pytest.mark.slow
def test_both_published_files_hold_the_same_encoder_and_torchvision_computes_what_timm_computes(
    published, exported, tmp_path
):
    name, _, folder = published
    run_export(folder / "x_1kpretrained_timm_style.pth", "--to", "torchvision", "--out", tmp_path / "tv.pth")
    theirs = torchvision.models.get_model(name).eval()
    theirs.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    if name.startswith("convnext"):
        theirs.classifier[-1] = torch.nn.Identity()
    else:
        theirs.fc = torch.nn.Identity()
    network = timm.create_model(name, num_classes=0, checkpoint_path=str(exported[0])).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), network(images), rtol=1e-4, atol=1e-4)


def test_training_begins_from_either_published_file(published):
    name, state, folder = published
    for file in folder.glob("*.pth"):
        model = build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=64, check=False)
        load_weights(file, model)
        found = spark_state_dict(model)
        kept = found if "withdecoder" in file.name else {k: v for k, v in found.items() if k.startswith("sparse_")}
        assert kept
        assert all(torch.equal(v, state[k]) for k, v in kept.items())


def test_a_run_becomes_a_folder_that_timm_knows_with_a_card_of_how_it_was_made(run, tmp_path, capsys):
    run_export(run, "--to", "hf_folder", "--out", tmp_path / "hub")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub"]
    assert sorted(p.name for p in (tmp_path / "hub").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    network = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert network.num_classes == 0
    assert torch.equal(network.state_dict()["conv1.0.weight"], weights_of(run)["encoder.network.conv1.0.weight"])
    headed = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=7)
    assert torch.equal(headed.state_dict()["conv1.0.weight"], network.state_dict()["conv1.0.weight"])
    assert headed.fc.out_features == 7
    card = (tmp_path / "hub" / "README.md").read_text()
    head = json.loads((run / "log.txt").read_text().splitlines()[0])
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [f"| {epoch} | {sum(losses[i : i + 2]) / 2:.4f} |" for epoch, i in ((1, 0), (2, 2))]
    made = [head["git_commit_id"], head["versions"]["torch"], "| step, epoch | 4, 2 of 2 |", "decoder_width = 32"]
    assert [part for part in (*curve, *made, "50% of them hidden") if part not in card] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("timm", "a.pth"),
        ("safetensors", "a.safetensors"),
        ("hf_folder", "a"),
        ("spark", "a.pth"),
        ("spark_encoder", "a.pth"),
    ],
)
def test_the_code_that_is_printed_loads_the_file(run, tmp_path, capsys, form, file):
    run_export(run, "--to", form, "--out", tmp_path / file)
    said, _, code = capsys.readouterr().out.partition("\n")
    names = {}
    exec(compile(code, "printed", "exec"), names)
    state = names.get("state") or names["network"].state_dict()
    assert f"{len(state)} tensors of resnet10t" in said


def test_the_published_form_of_a_run_is_read_back_whole(run, tmp_path):
    run_export(run / "ckpt-last.pth", "--to", "spark", "--out", tmp_path / "a.pth")
    model = build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32, check=False)
    load_spark_state_dict(model, torch.load(tmp_path / "a.pth", weights_only=True))
    assert equal(dict(model.state_dict()), weights_of(run))
    assert (tmp_path / "a.pth.README.md").read_text().startswith("# resnet10t")


def test_training_showed_its_pictures_in_the_folder_and_in_tensorboard(run):
    names = sorted(p.name for p in (run / "reconstruction").iterdir())
    assert names == ["epoch_0001.png", "epoch_0002.png"]
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = board.Images("reconstruction")
    assert [e.step for e in shown] == [2, 4]
    assert (shown[0].width, shown[0].height) == Image.open(run / "reconstruction" / "epoch_0001.png").size


def test_an_encoder_of_the_run_folder_is_a_source_too(run, tmp_path, capsys):
    run_export(run / "resnet10t_timm.safetensors", "--to", "timm", "--out", tmp_path / "a.pth")
    run_export(run / "resnet10t_timm.safetensors", "--to", "spark", "--out", tmp_path / "b.pth", code=2)
    assert "holds only an encoder, and the published format needs a decoder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "a.pth.README.md"]


@pytest.mark.slow
def test_exports_of_one_stem_each_have_their_card(run, tmp_path, capsys):
    run_export(run, "--to", "spark", "--out", tmp_path / "a.pth")
    run_export(run, "--to", "timm", "--out", tmp_path / "a.safetensors")
    assert 'network = timm.create_model("resnet10t"' in (tmp_path / "a.safetensors.README.md").read_text()
    assert 'torch.load("a.pth"' in (tmp_path / "a.pth.README.md").read_text()
    run_export(run, "--to", "timm", "--out", tmp_path / "a.pth", code=2)
    assert "a.pth already exists: remove it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["RUN", "--to", "torchvision", "--out", "a.pth"], 2, "torchvision has no resnet10t; it shares these networks"),
        (["RUN", "--to", "timm", "--out", "a.bin"], 2, "a.bin must end with .safetensors or .pth for --to timm"),
        (["RUN", "--to", "timm", "--out", "no/a.pth"], 2, "there is no folder no"),
        (["RUN", "--to", "timm", "--out", "taken.pth"], 2, "taken.pth already exists"),
        (["RUN", "--to", "hf_folder", "--out", "taken"], 2, "taken already exists"),
        (["RUN", "--to", "timm", "--out", "a.pth", "--model", "resnet18"], 2, "does not fit this model"),
        (["RUN", "--to", "timm", "--out", "a.pth", "--model", "resnet10"], 2, "unknown model 'resnet10'"),
        (["nowhere.pth", "--to", "timm", "--out", "a.pth"], 6, "there is no checkpoint nowhere.pth"),
        (["taken", "--to", "timm", "--out", "a.pth"], 6, "there is no checkpoint in taken"),
        (["odd.safetensors", "--to", "timm", "--out", "a.pth"], 6, "name the network with --model"),
        (["own.pth", "--to", "timm", "--out", "a.pth"], 2, "pass --model os:abort to import its code"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_input_is_named_and_leaves_nothing(run, tmp_path, capsys, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken.pth").write_bytes(b"mine")
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "odd.safetensors")
    if "own.pth" in words:
        content = torch.load(run / "ckpt-last.pth", weights_only=True)
        content["settings"]["model"]["model"] = "os:abort"
        torch.save(content, tmp_path / "own.pth")
    before = sorted(tmp_path.rglob("*"))
    run_export(*[run if w == "RUN" else w for w in words], code=code)
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken.pth").read_bytes() == b"mine"
