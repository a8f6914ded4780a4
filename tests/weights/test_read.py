"""One reader: whatever wrote the weights, the same tensors under the same names, and what the file tells of them."""

import pytest
import torch
from safetensors.torch import save_file

from spark_fast.checkpoint.file import write
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.training.settings import Settings
from spark_fast.weights.read import read_weights
from spark_fast.weights.spark_keys import ENCODER, spark_state_dict
from spark_fast.weights.timm_keys import encoder_state_dict, write_encoder
from tests.weights.tiny import tiny_spark

NETWORK = "my_network:build"


@pytest.fixture(scope="module")
def model():
    return tiny_spark()


def settings(**model):
    found = Settings()
    found.model.model = NETWORK
    for name, value in model.items():
        setattr(found.model, name, value)
    return found.to_dict()


def stored(model, folder, kind):
    """The same model in each of the files in which it may be found."""
    path = folder / "file.pth"
    if kind == "checkpoint":
        write(
            path, {"format": 1, "model": model.state_dict(), "settings": settings(), "step": 3, "epoch": 1, "loss": 2.0}
        )
    elif kind == "wrapped":
        torch.save({"module._orig_mod." + name: value for name, value in model.state_dict().items()}, path)
    elif kind == "published":
        config = {"module.config": {"mask_ratio": 0.6}, "module.imn_m": torch.zeros(1, 3, 1, 1)}
        state = {f"module.{name}": value for name, value in spark_state_dict(model).items()}
        torch.save({"arch": NETWORK, "input_size": 32, "module": state | config}, path)
    elif kind == "encoder":
        return write_encoder(encoder_state_dict(model, NETWORK), NETWORK, folder)
    return path


@pytest.mark.parametrize("kind", ["checkpoint", "wrapped", "published", "encoder"])
def test_every_kind_of_file_gives_the_same_names_and_tensors(model, tmp_path, kind):
    weights = read_weights(stored(model, tmp_path, kind))
    expected = {name.replace(".", "_"): value for name, value in model.state_dict().items()}
    if kind == "encoder":
        expected = {name: value for name, value in expected.items() if name.startswith(ENCODER)}
    found = weights.state
    assert (found.has_decoder, found.others) == (kind != "encoder", [])
    assert found.tensors.keys() == expected.keys() == found.names.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.tensors.items())
    assert weights.named == ("" if kind == "wrapped" else NETWORK)
    assert weights.input_size == ((32, 32) if kind == "published" else None)
    assert (weights.record is not None) == bool(weights.settings) == (kind == "checkpoint")


def test_what_stands_among_the_tensors_and_is_none_is_kept_by_name(tmp_path):
    torch.save({"module.conv1.weight": torch.zeros(1), "epoch": 3}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth").state
    assert (found.names, found.others) == ({ENCODER + "conv1_weight": "module.conv1.weight"}, ["epoch (int)"])


def test_the_names_of_official_convnexts_become_timms(tmp_path):
    names = {
        "downsample_layers.1.0.bias": "stages_1_downsample_0_bias",
        "stages.2.0.grn.beta": "stages_2_blocks_0_mlp_grn_bias",
    }
    for prefix in ("", "sparse_encoder.sp_cnn."):
        torch.save({prefix + name: torch.zeros(1) for name in names}, tmp_path / "a.pth")
        assert set(read_weights(tmp_path / "a.pth").state.tensors) == {ENCODER + name for name in names.values()}


@pytest.mark.parametrize("size", [[64, 96], (64, 96)])
def test_a_published_file_may_have_an_input_that_is_no_square(tmp_path, size):
    torch.save({"module": {}, "input_size": size}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").input_size == (64, 96)


def run_folder(model, folder, steps):
    (folder / "checkpoints").mkdir()
    (folder / "config.toml").touch()
    for step in steps:
        content = {"model": model.state_dict(), "settings": settings(stages=2), "step": step, "epoch": 0, "loss": 1.0}
        write(folder / "checkpoints" / f"step_{step:08d}.pth", content)
    return folder / "checkpoints" / f"step_{steps[-1]:08d}.pth"


def test_of_a_run_folder_it_is_the_newest_checkpoint_that_is_whole(model, tmp_path, caplog):
    newest = run_folder(model, tmp_path, (1, 2))
    assert read_weights(tmp_path).record.step == 2
    newest.write_bytes(newest.read_bytes()[:-1])
    weights = read_weights(tmp_path)
    assert (weights.record.step, weights.stages(NETWORK), weights.run_folder) == (1, 2, tmp_path)
    assert f"{newest} is damaged" in caplog.text


def test_a_file_taken_out_of_its_run_folder_has_none(model, tmp_path):
    assert read_weights(run_folder(model, tmp_path, (1,)).rename(tmp_path / "a.pth")).run_folder == tmp_path
    (tmp_path / "config.toml").unlink()
    assert read_weights(tmp_path / "a.pth").run_folder is None


def test_a_folder_without_a_checkpoint_and_a_format_of_the_future_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match=f"there is no checkpoint in {tmp_path}: pass a run folder"):
        read_weights(tmp_path)
    write(tmp_path / "a.pth", {"format": 2, "model": model.state_dict(), "settings": settings()})
    with pytest.raises(CheckpointError, match=r"a\.pth has format 2, this version reads 1"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["checkpoint", "published", "encoder"])
def test_code_that_a_file_names_is_taken_only_when_it_is_asked_for(model, tmp_path, kind):
    weights = read_weights(stored(model, tmp_path, kind))
    with pytest.raises(
        SettingsError, match=f"has the weights of your own network: pass --model {NETWORK} to import its code"
    ):
        weights.choose_network("")
    assert weights.choose_network("other:build") == "other:build"


def test_stages_that_are_no_number_are_refused(model, tmp_path):
    write(tmp_path / "a.pth", {"model": model.state_dict(), "settings": settings(stages="two")})
    with pytest.raises(CheckpointError, match="has settings that this version cannot read"):
        _ = read_weights(tmp_path / "a.pth").stages(NETWORK)


@pytest.mark.parametrize(
    ("told", "stages"), [("2", 2), ("4", 0), ("-1", 0), pytest.param("9" * 9999, 0, id="long"), ("two", 0), ("", 0)]
)
def test_the_metadata_of_a_file_tell_the_levels_that_were_pretrained(tmp_path, told, stages):
    save_file(
        {"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "a.safetensors", {"stages": told, "untrained": "b"}
    )
    weights = read_weights(tmp_path / "a.safetensors")
    assert (weights.stages("resnet10t"), list(weights.state.names.values())) == (stages, ["a"])
