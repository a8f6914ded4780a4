"""Ranks that would not do one run."""

from types import SimpleNamespace

import pytest

from spark_fast.errors import DataError, SettingsError
from spark_fast.run.agreement import check_images, check_settings
from spark_fast.training.settings import parse


def ranks(check, *each):
    """Run a check as every rank in turn would, with what the others hand over; what each raises."""
    handed = []
    for own in each:
        check(SimpleNamespace(world_size=len(each), gather=lambda mine: handed.append(mine) or [mine] * len(each)), own)
    raised = []
    for own in each:
        try:
            check(SimpleNamespace(world_size=len(each), gather=lambda _: handed), own)
        except (SettingsError, DataError) as error:  # noqa: PERF203
            raised.append(str(error))
    return raised


def settings(*words):
    return parse(["name", "--data_path=images", *words])


def test_every_rank_refuses_settings_that_are_not_those_of_the_first():
    told = ranks(check_settings, settings(), settings("--data_path=/local/images", "--workers=3"), settings("--seed=7"))
    assert told == ["rank 0 has --seed: 0, rank 2 has --seed: 7. All ranks must do the same run on the same images"] * 3
    assert ranks(check_settings, settings("--bs=8"), settings("--bs=8", "--exp_dir=elsewhere", "--device=cpu")) == []


@pytest.mark.parametrize(
    ("count", "listing", "message"),
    [(9, "abc", "/a, number of images: 10, rank 1 has /b, number of images: 9"), (10, "x", "hash of names and labels")],
)
def test_every_rank_refuses_images_that_are_not_those_of_the_first(count, listing, message):
    def check(of, images):
        check_images(of, SimpleNamespace(num_samples=images[1], listing=images[2]), images[0])

    told = ranks(check, ("/a", 10, "abc"), ("/b", count, listing))
    assert len(told) == 2
    assert all(message in text for text in told)
    assert ranks(check, ("/a", 10, "abc"), ("/b", 10, "abc")) == []


def test_a_rank_alone_asks_nobody():
    check_settings(SimpleNamespace(world_size=1), settings())
