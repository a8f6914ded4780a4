"""The command line: every spelling, every default, every refusal; and that no option appears by accident."""

import re
from pathlib import Path

import pytest

from spark_fast.errors import SettingsError
from spark_fast.training.settings import Settings, parse

NAMED = ["name", "--data_path=images"]

# The whole surface. A new option belongs here, in the README and in the CHANGELOG.
FLAGS = """
config print_config help
data_path val_path eval_every pipeline ffcv_resize decode augment input_size in_chans batch_size bs
workers dataloader_workers worker_processes prefetch shuffle_block cache_dir cache_size
max_bad_fraction max_pixels min_crop crop_scale
hflip no_hflip vflip no_vflip rot90 no_rot90
scale mean std channels_first no_channels_first npz_key method masks_per_image decoder_depth
model stages mask_ratio mask drop_path dp decoder_width encoder verify sparse_conv no_sparse_conv init_weight
epochs ep warmup_epochs wp_ep base_lr optimizer opt beta2 ada weight_decay wd weight_decay_end wde clip accumulate
allreduce zero no_zero max_bad_steps timeout
exp_name experiment_name exp_dir resume resume_from seed device precision compile cuda_graph no_cuda_graph
sync_batchnorm no_sync_batchnorm sbn no_sbn threads log_every save_every keep_last keep_every picture_every max_steps
picture_channels wandb dry_run no_dry_run profile no_profile
"""


def helped(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def refused(capsys, *words):
    """What tyro prints when it refuses a command line."""
    with pytest.raises(SystemExit) as left:
        parse([*NAMED, *words])
    assert left.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_surface_is_frozen(monkeypatch, capsys):
    assert sorted(set(re.findall(r"--([a-z][a-z0-9_]*)", helped(monkeypatch, capsys)))) == sorted(FLAGS.split())


def test_a_data_path_with_a_password_and_an_odd_cache_size_are_refused():
    with pytest.raises(SettingsError, match="user, password or query") as caught:
        parse(["name", "--data_path=https://me:secret@host/a"])
    assert "secret" not in str(caught.value)
    with pytest.raises(SettingsError, match="user, password or query"):
        parse([*NAMED, "--eval_every=1", "--val_path=https://host/a?sig=secret"])
    with pytest.raises(SettingsError, match="cache_size must be bytes with a unit"):
        parse([*NAMED, "--cache_size=much"])


def test_help_is_in_groups(monkeypatch, capsys):
    text = helped(monkeypatch, capsys)
    places = [text.index(f"{group} options") for group in ("data", "model", "optim", "run")]
    assert places == sorted(places)


def test_defaults_are_the_published_ones():
    found = parse(NAMED)
    assert (found.optim.epochs, found.warmup_epochs, found.data.batch_size) == (1600, 40, 4096)
    assert (found.optim.base_lr, found.optim.optimizer, found.optim.clip) == (2e-4, "lamb", 5.0)
    assert (found.optim.weight_decay, found.optim.weight_decay_end) == (0.04, 0.2)
    assert (found.model.mask_ratio, found.network, found.size) == (0.6, "resnet50", (224, 224))
    assert found.run.sync_batchnorm
    assert found.peak_lr == pytest.approx(2e-4 * 16)
    assert found.folder == Path("output_name")


@pytest.mark.parametrize(
    ("short", "network", "drop_path", "beta2"),
    [("res50", "resnet50", 0.05, 0.95), ("res101", "resnet101", 0.08, 0.95), ("res152", "resnet152", 0.10, 0.95),
     ("res200", "resnet200", 0.15, 0.95), ("cnxS", "convnext_small", 0.2, 0.999), ("cnxB", "convnext_base", 0.3, 0.999),
     ("cnxL", "convnext_large", 0.4, 0.999), ("resnet50", "resnet50", 0.05, 0.95), ("resnet10t", "resnet10t", 0, 0.95),
     ("convnext_tiny", "convnext_tiny", 0, 0.999)],
)  # fmt: skip
def test_each_model_has_its_published_drop_path_and_beta2(short, network, drop_path, beta2):
    found = parse([*NAMED, f"--model={short}"])
    assert (found.network, found.drop_path, found.beta2) == (network, drop_path, beta2)
    chosen = parse([*NAMED, f"--model={short}", "--dp=0.33", "--ada=0.98"])
    assert (chosen.drop_path, chosen.beta2) == (0.33, 0.98)
    assert parse([*NAMED, f"--model={short}", "--dp=0"]).drop_path == 0


@pytest.mark.parametrize(
    ("words", "epochs"),
    [([], 40), (["--ep=800"], 40), (["--ep=400"], 40), (["--ep=100"], 10), (["--ep=4"], 0.4),
     (["--ep=4", "--wp_ep=4"], 4), (["--ep=4", "--wp_ep=0"], 0)],
)  # fmt: skip
def test_warm_up_is_the_published_one_and_at_most_a_tenth_of_a_short_run_unless_chosen(words, epochs):
    assert parse([*NAMED, *words]).warmup_epochs == epochs


def test_a_command_line_of_the_published_script_runs_unchanged():
    line = (
        "--exp_name=a --exp_dir=b --data_path=c --model=resnet50 --bs=512 --mask=0.6 --ep 3 --wp_ep=1 --base_lr=4e-4 "
        "--wd=0.05 --wde=0.3 --clip=4 --opt=adamw --ada=0.96 --dp=0.06 --sbn=True --dataloader_workers=4 "
        "--input_size=192 --resume_from=d --sparse_conv=0"
    )
    found = parse(line.split())
    assert (found.run.exp_name, found.run.exp_dir, found.data.data_path, found.run.resume) == ("a", "b", "c", "d")
    assert (found.data.batch_size, found.data.workers, found.size) == (512, 4, (192, 192))
    assert (found.model.mask_ratio, found.model.drop_path) == (0.6, 0.06)
    optim = found.optim
    assert (optim.epochs, optim.warmup_epochs, optim.base_lr, optim.clip) == (3, 1, 4e-4, 4.0)
    assert (optim.weight_decay, optim.weight_decay_end, optim.optimizer, optim.beta2) == (0.05, 0.3, "adamw", 0.96)
    assert found.run.sync_batchnorm
    assert found.peak_lr == pytest.approx(8e-4)
    assert found.folder == Path("b")


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [("bs", "batch_size", "64"), ("dataloader_workers", "workers", "3"), ("mask", "mask_ratio", "0.7"),
     ("dp", "drop_path", "0.1"), ("ep", "epochs", "7"), ("wp_ep", "warmup_epochs", "2"), ("opt", "optimizer", "sgd"),
     ("ada", "beta2", "0.9"), ("wd", "weight_decay", "0.1"), ("wde", "weight_decay_end", "0.5"),
     ("resume_from", "resume", "auto"), ("experiment_name", "exp_name", "other"), ("sbn", "sync_batchnorm", "0")],
)  # fmt: skip
def test_an_alias_is_the_setting_itself(alias, name, value):
    forms = [[f"--{flag}={value}"] for flag in (alias, name)] + [[f"--{flag}", value] for flag in (alias, name)]
    found = [parse([*NAMED, *form]) for form in forms]
    assert all(f == found[0] for f in found)
    assert found[0] != parse(NAMED)


def test_the_name_may_stand_first_without_a_flag():
    assert parse(["name", "--data_path=c"]) == parse(["--data_path=c", "--exp_name=name"])


@pytest.mark.parametrize("words", [["--sbn=0"], ["--sbn=False"], ["--sbn", "False"], ["--sbn", "0"], ["--no_sbn"],
                                   ["--no_sync_batchnorm"], ["--sync_batchnorm=false"]])  # fmt: skip
def test_a_switch_is_turned_off_in_every_spelling(words):
    found = parse([*NAMED, *words, "--compile", "--ep=3"])
    assert found.run.sync_batchnorm is False
    assert (found.run.compile, found.optim.epochs) == ("default", 3)


@pytest.mark.parametrize("words", [["--zero"], ["--zero=1"], ["--zero", "True"], ["--zero=true"]])
def test_a_switch_is_turned_on_in_every_spelling(words):
    assert parse([*NAMED, *words, "--ep=3"]).optim.zero is True


@pytest.mark.parametrize(
    ("words", "mode"),
    [("", "off"), ("--compile", "default"), ("--compile=1", "default"), ("--compile True", "default"),
     ("--compile=true", "default"), ("--compile default", "default"), ("--compile=max-autotune", "max-autotune"),
     ("--compile reduce-overhead", "reduce-overhead"), ("--compile --no_compile", "off"), ("--no-compile", "off"),
     ("--compile=0", "off"), ("--compile False", "off"), ("--compile=off --compile", "default")],
)  # fmt: skip
def test_compile_was_a_switch_and_now_names_a_mode(words, mode):
    for there in ([*words.split(), "--ep=3"], ["--ep=3", *words.split()]):
        found = parse([*NAMED, *there])
        assert (found.run.compile, found.optim.epochs) == (mode, 3)


def test_an_unknown_way_to_compile_is_refused_and_the_ways_are_told(capsys):
    assert "max-autotune" in refused(capsys, "--compile=fast")
    assert "fast" in refused(capsys, "--compile", "fast")


def test_a_checkpoint_from_when_compile_was_a_switch_is_understood():
    for before, mode in ((True, "default"), (False, "off")):
        assert Settings.from_dict({"run": {"compile": before}}).run.compile == mode


@pytest.mark.parametrize("word", ["--cuda_graph", "--accumulate=2"])
def test_a_compiler_that_makes_graphs_goes_with_no_other_and_no_accumulation(word):
    assert parse([*NAMED, "--compile=max-autotune", word]).run.compile == "max-autotune"
    with pytest.raises(SettingsError, match="use --compile or --compile max-autotune"):
        parse([*NAMED, "--compile=reduce-overhead", word])


def test_values_keep_their_dashes_and_underscores():
    assert parse(["name", "--data_path=/a-b/c_d", "--exp_dir", "e-f_g"]).run.exp_dir == "e-f_g"
    assert parse(["name", "--data_path=/a-b/c_d"]).data.data_path == "/a-b/c_d"


@pytest.mark.parametrize("value", ["sbn=0", "compile=1"])
def test_a_value_that_looks_like_a_switch_is_a_value(value):
    assert parse(["--exp_name", value, "--data_path=c"]).run.exp_name == value


def test_the_published_flag_for_true_sparse_convolutions():
    assert parse([*NAMED, "--sparse_conv=1"]).encoder == "sparseconvnet"
    assert parse([*NAMED, "--encoder=masked"]).encoder == "masked"
    with pytest.raises(SettingsError, match="contradict each other"):
        parse([*NAMED, "--sparse_conv=1", "--encoder=masked"])


def configured(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return f"--config={path}"


def test_a_file_overrides_defaults_and_flags_override_the_file(tmp_path):
    config = configured(tmp_path, '[data]\nbatch_size = 64\n[optim]\nepochs = 5\noptimizer = "sgd"\n')
    for words in ([config, "--ep=9"], ["--ep=9", config], ["--ep=9", *config.split("=")]):
        found = parse([*NAMED, *words])
        assert (found.optim.epochs, found.data.batch_size, found.optim.optimizer) == (9, 64, "sgd")
        assert found.optim.weight_decay == 0.04


def test_switches_of_a_file_are_overridden_both_ways(tmp_path):
    config = configured(tmp_path, "[run]\ncompile = true\nsync_batchnorm = false\n")
    found = parse([*NAMED, config])
    assert (found.run.compile, found.run.sync_batchnorm) == ("default", False)
    found = parse([*NAMED, config, "--compile=0", "--sbn=1"])
    assert (found.run.compile, found.run.sync_batchnorm) == ("off", True)


def test_print_config_prints_what_config_reads_back(tmp_path, capsys):
    words = ["odd name-1", "--data_path=/a b/ü", "--bs=64", "--sbn=0", "--base_lr=3e-7", "--opt=sgd", "--compile"]
    with pytest.raises(SystemExit) as left:
        parse([*words, "--print_config"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    config = configured(tmp_path, printed)
    assert parse([config]) == parse(words)
    with pytest.raises(SystemExit):
        parse([config, "--print_config"])
    assert capsys.readouterr().out == printed


def test_the_file_kept_in_a_run_folder_holds_every_setting():
    tree = Settings().to_dict()
    assert set(tree) == {"data", "model", "optim", "run"}
    text = Settings().to_toml()
    assert all(re.search(rf"^{name} = ", text, re.M) for group in tree.values() for name in group)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[optim]\nepoch = 3\n", r"\[optim\] has no setting 'epoch'; did you mean .*epochs"),
     ("[data]\nbs = 8\n", r"\[data\] has no setting 'bs': it is --bs on the command line, batch_size here"),
     ("[data]\nzzzz = 3\n", r"\[data\] has no setting 'zzzz'; choose one of augment"),
     ("[optimizer]\nepochs = 3\n", r"\[optimizer\] is not a section; choose one of data, model, optim, run"),
     ("epochs = 3\n", r"\[epochs\] is not a section"),
     ("[optim\n", "cannot be read")],
)  # fmt: skip
def test_what_a_file_cannot_say_is_an_error_that_names_it(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message) as caught:
        parse([*NAMED, configured(tmp_path, text)])
    assert "run.toml" in str(caught.value)


def test_a_file_of_no_text_and_one_that_is_not_there_are_named(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"binary\.toml cannot be read"):
        parse([*NAMED, f"--config={tmp_path / 'binary.toml'}"])
    with pytest.raises(SettingsError, match=r"no configuration file .*none\.toml"):
        parse([*NAMED, f"--config={tmp_path / 'none.toml'}"])


def test_a_wrong_type_in_a_file_is_refused_as_on_the_command_line(tmp_path, capsys):
    assert "batch_size" in refused(capsys, configured(tmp_path, '[data]\nbatch_size = "many"\n'))


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--epoch=3", "--epochs"), ("--mask_ration=0.5", "--mask_ratio"), ("--dataloader_worker=2", "--workers")],
)
def test_an_unknown_flag_is_refused_with_the_nearest_name(capsys, flag, nearest):
    text = refused(capsys, flag)
    assert flag in text
    assert nearest in text


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--bs=many", "--batch_size"), ("--ep=1.5", "--epochs"), ("--mask=half", "--mask_ratio"),
     ("--opt=adam", "'lamb', 'adamw', 'sgd'"), ("--encoder=sparse", "'packed', 'masked'"),
     ("--precision=fp8", "'bf16', 'fp16', 'fp32'"), ("--device=tpu", "'cuda', 'cpu'"), ("--sbn=2", "2"),
     ("--config", "--config")],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused(capsys, flag, message):
    assert message in refused(capsys, flag)


def test_settings_become_a_dictionary_and_back():
    found = parse([*NAMED, "--bs=8", "--save_every=10min"])
    assert Settings.from_dict(found.stored()) == found
    assert Settings.from_dict({}) == Settings()
    with pytest.raises(TypeError, match="wings"):
        Settings.from_dict({"model": {"wings": 2}})


def test_no_stochastic_depth_is_told_from_the_published_rate_in_old_checkpoints_too():
    none, default = parse([*NAMED, "--dp=0"]), parse(NAMED)
    assert (Settings.from_dict(none.stored()).drop_path, Settings.from_dict(default.stored()).drop_path) == (0, 0.05)
    assert "drop_path = 0.0" in none.to_toml()
    assert 'drop_path = "auto"' in default.to_toml()
    assert Settings.from_dict(none.to_dict()).drop_path == 0.05, "before format 2 it stood for the published rate"
    assert Settings.from_names(data_path="c", exp_name="n", drop_path=0).drop_path == 0
    assert Settings.from_names(data_path="c", exp_name="n", drop_path="auto", epochs=10).warmup_epochs == 1
    with pytest.raises(SettingsError, match="drop_path must be of type float, got 'x'"):
        Settings.from_names(data_path="c", exp_name="n", drop_path="x")


SAME = [
    (["--model=res50"], ["--model=resnet50"]),
    (["--input_size=224"], ["--input_size=224x224"]),
    (["--sparse_conv=1"], ["--encoder=sparseconvnet"]),
    ([], ["--dp=0.05", "--ada=0.95"]),
    (["--wd=0.3", "--wde=0"], ["--wd=0.3", "--wde=0.3"]),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_spellings_of_one_thing_have_one_meaning(one, other):
    one, other = parse([*NAMED, *one]), parse([*NAMED, *other])
    assert one != other
    one, other = one.meaning(), other.meaning()
    assert one["model"].pop("sparse_conv") is not None
    assert other["model"].pop("sparse_conv") is not None
    assert one == other


@pytest.mark.parametrize("words", [["--lr", "0.1"], ["--lr=0.1"]])
def test_the_published_flag_that_was_ignored_is_ignored_and_said_to_be(words, caplog):
    """pretrain/README.md: "do not use `--lr` to specify a lr (that will be ignored)"."""
    assert parse([*NAMED, *words, "--bs=512"]) == parse([*NAMED, "--bs=512"])
    (message,) = caplog.messages
    assert message == "--lr 0.1 is ignored, as in the published code: the rate is --base_lr times --bs / 256"


def test_a_method_brings_its_own_defaults_and_flags_change_them(tmp_path):
    spark, fcmae = parse(NAMED), parse([*NAMED, "--method", "fcmae"])
    assert (spark.model.method, spark.optim.optimizer, spark.data.min_crop, spark.optim.clip) == (
        "spark", "lamb", 0.67, 5.0,
    )  # fmt: skip
    optim = fcmae.optim
    assert (optim.optimizer, optim.base_lr, optim.beta2, optim.clip) == ("adamw", 1.5e-4, 0.95, 0.0)
    assert (optim.weight_decay, optim.weight_decay_end, fcmae.data.min_crop) == (0.05, 0.05, 0.2)
    assert (fcmae.model.decoder_width, fcmae.model.decoder_depth, fcmae.drop_path) == (512, 1, 0.0)
    changed = parse([*NAMED, "--base_lr=3e-4", "--method=fcmae", "--clip", "1"])
    assert (changed.optim.base_lr, changed.optim.clip, changed.optim.optimizer) == (3e-4, 1.0, "adamw")
    config = tmp_path / "a.toml"
    config.write_text('[model]\nmethod = "fcmae"\n[optim]\nbase_lr = 1e-3\n')
    read = parse([*NAMED, "--config", str(config)])
    assert (read.optim.base_lr, read.optim.optimizer) == (1e-3, "adamw")
    assert Settings.from_names(exp_name="n", data_path="d", method="fcmae", epochs=3).optim.optimizer == "adamw"
    again = tmp_path / "b.toml"
    again.write_text(fcmae.to_toml())
    assert parse(["--config", str(again)]) == fcmae
    assert Settings.from_dict(fcmae.stored()) == fcmae


@pytest.mark.parametrize(
    ("name", "said"),
    [("fcmaee", "unknown method 'fcmaee': choose one of spark, fcmae"), ("no.such:Thing", "cannot be imported"),
     ("spark_fast.spark:build_spark", "is no subclass of")],
)  # fmt: skip
def test_a_method_that_is_none_is_refused(name, said):
    with pytest.raises(SettingsError, match=said):
        parse([*NAMED, "--method", name])


def test_the_share_of_a_crop_is_the_smallest_alone_or_both():
    assert parse(NAMED).crop_scale == (0.67, 1.0)
    assert parse([*NAMED, "--min_crop=0.3"]).crop_scale == (0.3, 1.0)
    assert parse([*NAMED, "--crop_scale", "0.2", "0.9"]).crop_scale == (0.2, 0.9)
    assert parse([*NAMED, "--method=fcmae"]).crop_scale == (0.2, 1.0)
    for wrong in (["0.2"], ["0.9", "0.2"], ["0", "1"], ["0.2", "1.1"]):
        with pytest.raises(SettingsError, match="--crop_scale takes two numbers, 0 < LOW <= HIGH <= 1, got"):
            parse([*NAMED, "--crop_scale", *wrong])


def test_both_spellings_of_the_same_crops_have_one_meaning():
    one, other = parse([*NAMED, "--min_crop=0.2"]), parse([*NAMED, "--crop_scale", "0.2", "1"])
    assert one.meaning() == other.meaning() != parse(NAMED).meaning()


def test_how_images_are_scaled_and_turned_is_a_setting():
    data = parse([*NAMED, "--scale=percentile", "--mean", "0.5", "-1.5", "--no_hflip", "--rot90", "--vflip=1"]).data
    assert (data.scale, data.mean, data.hflip, data.rot90, data.vflip) == ("percentile", (0.5, -1.5), False, True, True)


def test_channels_are_given_by_flags_and_by_a_file(tmp_path):
    found = parse([*NAMED, "--in_chans", "12", "--picture_channels", "3", "2", "1", "--ep=3"])
    assert (found.in_chans, found.run.picture_channels, found.optim.epochs) == (12, (3, 2, 1), 3)
    (tmp_path / "a.toml").write_text(found.to_toml())
    assert parse([f"--config={tmp_path / 'a.toml'}"]) == found
    assert (parse(NAMED).in_chans, parse(NAMED).run.picture_channels) == (3, ())
    assert Settings.from_names(in_chans=5, picture_channels=[4], exp_name="a", data_path="b").run.picture_channels == (
        4,
    )
