"""What several tests share: where the recorded figures and the real images are."""

import importlib.util
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.optional import MODULES, missing

if importlib.util.find_spec("hypothesis"):  # the tests that run on a GPU do without
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # the machine may be busy
    settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's & has it, which the programs under test inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(os.environ.get("SPARK_FAST_SHARED", Path(__file__).parents[2] / "shared"))


LEFT = pytest.StashKey[int]()  # how many slow tests were left for --full


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests too, as CI does")
    parser.addoption(
        "--repeat_drills",
        action="store_true",
        help="repeat the drills of tests/faults as docs/explanation/reliability.md says",
    )


def pytest_collection_modifyitems(config, items):
    """Slow tests are left for --full; tests of an optional decoder are, too, and skipped where it is not installed.

    The longest forms of fuzz and drills wait for --repeat_drills too: with them CI would take more than half an hour.
    """

    def is_slow(item):
        return any(item.get_closest_marker(name) for name in ("slow", "drill", *MODULES))

    if not config.getoption("--full"):
        slow = [item for item in items if is_slow(item)]
        items[:] = [item for item in items if not is_slow(item)]
        config.hook.pytest_deselected(items=slow)
        config.stash[LEFT] = len(slow)
    if not config.getoption("--repeat_drills"):
        drills = [item for item in items if item.get_closest_marker("drill")]
        items[:] = [item for item in items if not item.get_closest_marker("drill")]
        config.hook.pytest_deselected(items=drills)
    for item in items:
        if item.get_closest_marker("djpeg") and not shutil.which("djpeg"):
            item.add_marker(pytest.mark.skip(reason="djpeg is not installed: apt-get install libjpeg-turbo-progs"))
        for decoder in MODULES:
            if item.get_closest_marker(decoder) and (why := missing(decoder)):
                item.add_marker(pytest.mark.skip(reason=why))


def pytest_runtest_setup(item):
    """Random numbers are those of the test alone, whichever tests the process has run before."""
    torch.manual_seed(0)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of xdist, which prints nothing itself
        session.config.workeroutput["left"] = session.config.stash.get(LEFT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Each process of xdist collects, and so leaves, the same tests."""
    node.config.stash[LEFT] = getattr(node, "workeroutput", {}).get("left", 0)


def pytest_terminal_summary(terminalreporter, config):
    if left := config.stash.get(LEFT, 0):
        terminalreporter.write_line(f"{left} slow tests were left for --full")


@pytest.fixture(scope="session")
def times(request):
    """times(few, many): how often a drill repeats itself, many times with --repeat_drills."""
    return lambda few, many: many if request.config.getoption("--repeat_drills") else few


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    # two processes on two cores, or one alone
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="module")
def one_thread():
    """On small tensors threads only wait for each other, for minutes where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"no recorded figures of the published code at {SHARED / 'golden'}")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def golden(golden_folder):
    """name -> (figures, arrays, starting state dict as float32 tensors)."""
    spec = importlib.util.spec_from_file_location("golden_weights", golden_folder / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)

    def load(name):
        figures, arrays = weights.load(golden_folder / f"{name}.json")
        state = {k: torch.from_numpy(v) for k, v in weights.state_dict(figures["parameters"]).items()}
        return figures, arrays, state

    return load


@pytest.fixture(scope="session")
def shared_reports() -> Path:
    """Small inputs of users that once failed."""
    folder = SHARED / "reports"
    if not folder.is_dir():
        pytest.skip(f"no reported inputs at {folder}")
    return folder


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    folder = SHARED / "data" / "imagenet_sample"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder
