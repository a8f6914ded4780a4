"""Drills of several ranks: one is killed, stopped or gets a NaN; nodes come and go; the number of ranks changes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.cli.tiny_run import assert_same_weights, pictures, weights  # noqa: F401
from tests.commands import HANG_SECONDS
from tests.faults import trainee
from tests.faults.test_run import FCMAE, STEPS, flags_of, here, rows, samples

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launcher(*options, ranks=2):
    where = options or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc_per_node={ranks}"]


def torchrun(ledger, plan, *flags, ranks=2, restarts=0, code=0):
    """torchrun reports any failure as 1."""
    words = [*launcher(ranks=ranks), f"--max-restarts={restarts}", trainee.__file__, ledger, plan, *flags]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=HANG_SECONDS, env=ENVIRONMENT)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory, times):  # noqa: F811
    """A run of two ranks, 2 epochs of 6 steps (3 in full), never disturbed."""
    return undisturbed(tmp_path_factory.mktemp("two"), flags_of(pictures, times(2, 3)))


@pytest.fixture(scope="module")
def whole_of_fcmae(pictures, tmp_path_factory, times):  # noqa: F811
    return undisturbed(tmp_path_factory.mktemp("fcmae"), flags_of(pictures, times(2, 3), FCMAE))


def undisturbed(folder, flags):
    torchrun(folder / "ledger", "", *flags, f"--exp_dir={folder / 'run'}")
    return folder, flags


@pytest.mark.parametrize("method", [[], pytest.param([FCMAE], marks=pytest.mark.drill)], ids=["spark", "fcmae"])
def test_when_a_rank_is_killed_the_other_leaves_and_names_it(pictures, tmp_path, times, method):  # noqa: F811
    """Row 3."""
    flags = flags_of(pictures, times(2, 3), *method)
    for i in range(times(1, 10)):
        words = [*flags, "--timeout=7200", f"--exp_dir={tmp_path / str(i)}"]  # it is not this that ends the other
        done = torchrun(tmp_path / f"{i}.ledger", f"saved,{i % 2}:4:kill", *words, code=1)
        told = [text for text in done.stderr.splitlines() if f"rank {1 - i % 2} exits because another rank" in text]
        assert len(told) == 1, done.stderr
        assert re.search(
            rf"rank {i % 2} \(.*, pid \d+\), last heard of at step \d, (in the step|waiting for data|saving)", told[0]
        )
        assert "in pretrain" not in done.stderr, "a line, and no traceback of ours"
        assert weights(tmp_path / str(i))["step"] >= 3


@pytest.mark.parametrize("of", ["whole", pytest.param("whole_of_fcmae", marks=pytest.mark.drill)])
def test_killed_ranks_come_back_with_torchruns_restarts_to_the_same_bits(request, tmp_path, times, of):
    """Five kills, of either rank."""
    folder, flags = request.getfixturevalue(of)
    plan = times("1:3:kill,0:8:kill", "1:3:kill,0:5:kill,1:8:kill,0:11:kill,1:15:kill")
    done = torchrun(tmp_path / "ledger", plan, *flags, f"--exp_dir={tmp_path / 'run'}", restarts=5)
    assert "torchrun restarted this run: it resumes as with --resume auto" in done.stderr
    assert len(list(tmp_path.glob("ledger.*"))) == times(2, 5), "all were killed"
    assert_same_weights(folder / "run", tmp_path / "run")
    assert samples(tmp_path / "ledger") == samples(folder / "ledger")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, STEPS * times(2, 3) + 1))


@pytest.mark.drill
def test_a_rank_that_is_stopped_is_named_and_given_up(whole, tmp_path):
    """Row 24: SIGSTOP. The other one waits for it in an exchange."""
    _, flags = whole
    words = [*flags, "--timeout=30", f"--exp_dir={tmp_path / 'run'}"]
    done = torchrun(tmp_path / "ledger", "saved,1:4:stop", *words, code=1)
    assert re.search(
        r"rank 0 has made no progress for \d+ s at step \d, (in the step|waiting for data|saving)", done.stderr
    )
    assert re.search(r"it may be waiting for rank 1 \(.*, pid \d+\), last heard of at step \d", done.stderr)
    assert weights(tmp_path / "run")["step"] >= 3


def test_a_nan_on_one_rank_skips_the_step_on_all(pictures, tmp_path):  # noqa: F811
    """Row 13."""
    torchrun(tmp_path / "ledger", "1:4:nan", *flags_of(pictures, 1), f"--exp_dir={tmp_path / 'run'}")
    (bad,) = [json.loads(line) for line in (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()]
    assert bad == {"step": 5, "samples": samples(tmp_path / "ledger")[4]}
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 0, 0, 0, 1, 0]
    assert all(t.isfinite().all() for t in weights(tmp_path / "run")["model"].values())


def test_the_number_of_ranks_may_change(pictures, tmp_path, times):  # noqa: F811
    """Row 6: 1 -> 2 (-> 4) -> 1, each time with other workers: same samples, same losses."""
    flags = flags_of(pictures, times(2, 3))
    here(tmp_path / "one.ledger", "", *flags, f"--exp_dir={tmp_path / 'one'}")
    words = [*flags, f"--exp_dir={tmp_path / 'run'}", "--resume=auto"]
    here(tmp_path / "ledger", "", *words, "--max_steps=4", code=75)
    for ranks in times([2], [2, 4]):
        torchrun(tmp_path / "ledger", "", *words, "--max_steps=4", f"--workers={ranks + 1}", ranks=ranks)
    here(tmp_path / "ledger", "", *words, "--workers=1")
    parts: dict[int, list[int]] = {}
    for line in (tmp_path / "ledger").read_text().splitlines():
        row = json.loads(line)
        parts.setdefault(row["step"], []).append((row["rank"], row["ids"]))
    joined = {step: [i for _, ids in sorted(some) for i in ids] for step, some in sorted(parts.items())}
    assert joined == samples(tmp_path / "one.ledger")
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("run", "one")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.drill
def test_a_node_that_is_killed_comes_back_and_the_run_completes(whole, tmp_path):
    """Two nodes on this machine, each a torchrun of its own; all processes of the second one get SIGKILL.

    They get it while its rank is stopped in the middle of an epoch, so that the run cannot end before.
    """
    folder, flags = whole
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=drill"]

    def node(name, host, plan=""):
        words = [*launcher(*meet, f"--rdzv-conf=is_host={host}", ranks=1), "--max-restarts=3", trainee.__file__]
        words += [tmp_path / "ledger", plan, *flags, f"--exp_dir={tmp_path / 'run'}"]
        out = (tmp_path / name).open("w")
        environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/tutorials/many_devices.md
        return subprocess.Popen(list(map(str, words)), stdout=out, stderr=out, env=environment)

    def told():
        return "\n".join(path.read_text() for path in tmp_path.glob("node*"))

    nodes = [node("node0", 1), node("node1", 0, plan="0:4:stop,1:4:stop")]  # whichever rank it becomes
    while not list(tmp_path.glob("ledger.*")):
        assert all(process.poll() is None for process in nodes), told()
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(nodes[1].pid)], capture_output=True, text=True).stdout.split()
    for pid in (nodes[1].pid, *map(int, ranks)):  # a rank has a session of its own
        os.kill(pid, signal.SIGKILL)
    nodes[1].wait()
    nodes[1] = node("node1 again", 0)
    assert [process.wait() for process in nodes] == [0, 0], told()
    assert_same_weights(folder / "run", tmp_path / "run")
    assert samples(tmp_path / "ledger") == samples(folder / "ledger")
