"""What every drill has: a time limit, so that a hang is a failure, and the marker `faults`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.conftest import beton_folder, image_folder, imagenet_sample  # noqa: F401

DRILL_SECONDS = {False: 1200, True: 7200}  # once, repeated; the machine may be busy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(autouse=True)
def _no_hang(request: pytest.FixtureRequest) -> Iterator[None]:
    seconds = DRILL_SECONDS[request.config.getoption("--repeat_drills")]

    def give_up(*_: object) -> None:
        raise TimeoutError(f"the drill hangs: not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
