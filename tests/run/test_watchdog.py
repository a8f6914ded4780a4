"""A run that stands still ends by itself and says where; one that goes on is left alone."""

import re
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from spark_fast.run.watchdog import PULSE, Watchdog
from tests.commands import HANG_SECONDS

STUCK = """
import sys, time, threading
from spark_fast.run.watchdog import Watchdog
watchdog = Watchdog(1.0, kept=lambda: "go on with --resume auto", prog="spark-fast-eval knn").__enter__()
watchdog.at(3, "waiting for data")
def read_the_disk():
    time.sleep(600)
read_the_disk()
"""


@pytest.mark.slow
def test_a_process_that_stands_still_ends_and_says_where():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 5
    told = r"^spark-fast-eval knn: rank 0 has made no progress for \d+ s at step 3, waiting for data \(--timeout 1\)"
    assert re.search(told, done.stderr), done.stderr
    assert "go on with --resume auto" in done.stderr
    assert "in read_the_disk" in done.stderr


@pytest.mark.slow
def test_the_rank_that_is_gone_is_named():
    store = dist.HashStore()
    dogs = [Watchdog(600, rank, 2, store).__enter__() for rank in range(2)]
    dogs[1].at(7, "in the step")
    while not store.check(["pulse/0", "pulse/1"]):
        time.sleep(PULSE)
    assert dogs[0].lost() == []
    dogs[1].__exit__()
    (lost,) = dogs[0].lost()
    assert lost.startswith("rank 1 (")
    assert lost.endswith("last heard of at step 7, in the step")
    dogs[0].__exit__()
