"""What an evaluation is asked for: loading as in pre-training, and what does not go together."""

import pytest

from spark_fast.errors import SettingsError
from spark_fast.evaluation.data import open_train
from spark_fast.evaluation.eval_settings import Data, parse
from spark_fast.evaluation.online_knn import as_evaluation
from spark_fast.pipelines import View
from spark_fast.run import command
from spark_fast.run.distributed import join
from spark_fast.run.loading import Loading
from spark_fast.training import settings as pretraining

NAMED = ["name", "--data_path=images", "--weights=none", "--model=resnet50"]


def test_pre_training_and_evaluation_load_by_the_same_settings():
    assert issubclass(Data, Loading)
    assert issubclass(pretraining.Data, Loading)


@pytest.mark.parametrize("mode", ["knn", "linear", "finetune"])
def test_what_is_said_of_loading_reaches_the_pipeline(monkeypatch, mode):
    asked = []
    monkeypatch.setattr(command, "build_pipeline", lambda path, options: asked.append(options))
    words = ["--workers=6", "--worker_processes=3", "--cache_dir=here", "--cache_size=7GB", "--prefetch=5"]
    for more in ([], words):
        settings = parse([mode, *NAMED, *more]).resolved("resnet50", 0)
        with pytest.raises(AttributeError):  # there is no pipeline
            open_train(settings, join("cpu"), View())
    default, found = asked
    assert (default.worker_processes, default.cache_dir, default.cache_size) == ("auto", "", "50GB")
    assert (found.workers, found.worker_processes, found.prefetch) == (6, 3, 5)
    assert (found.cache_dir, found.cache_size) == ("here", "7GB")


def test_the_evaluation_of_a_run_loads_as_the_run_does():
    words = ["name", "--data_path=images", "--val_path=labelled", "--eval_every=1", "--worker_processes=3"]
    data = as_evaluation(pretraining.parse([*words, "--cache_dir=here", "--shuffle_block=2"]), join("cpu")).data
    assert (data.data_path, data.worker_processes, data.cache_dir) == ("labelled", 3, "here")
    assert data.shuffle_block == 0, "its images are read in order"


@pytest.mark.parametrize(("mode", "more"), [("finetune", []), ("linear", ["--augment"])])
def test_blocks_of_shards_are_for_images_that_are_shuffled(mode, more):
    assert parse([mode, *NAMED, *more, "--shuffle_block=4"]).data.shuffle_block == 4


@pytest.mark.parametrize("mode", ["knn", "linear"])
def test_blocks_of_shards_are_refused_where_images_are_read_in_order(mode):
    with pytest.raises(SettingsError, match="--shuffle_block is for images that are shuffled: finetune, and linear"):
        parse([mode, *NAMED, "--shuffle_block=4"])
