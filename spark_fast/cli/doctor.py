"""Check what this machine supports, what is missing, and what to install or set.

    spark-fast-doctor [--data_path PATH] [--exp_dir FOLDER]

With a data path, of any kind that training takes, it also shows how many images a second these cores can load, what
limits them, and what to do.

Exit codes: 0 training can run, 1 something that it needs is missing.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import resource
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spark_fast.cli.start import start
from spark_fast.cli.tool import run_tool
from spark_fast.commands import INSTALL_DALI, INSTALL_FFCV, command
from spark_fast.errors import SettingsError, SparkFastError
from spark_fast.operating_system import usable_cores

if TYPE_CHECKING:  # torch may not load
    from spark_fast.pipelines.options import LoaderOptions

IMPORTED = {  # module that training cannot do without, each needed by the next: how to get one that loads
    "torch": "https://pytorch.org/get-started/locally",
    "torchvision": "one built for this torch: https://pytorch.org/get-started/locally",
    "timm": "pip install --force-reinstall --no-deps timm",
}
OPTIONAL = {  # module: (what it is for, how to get it)
    "triton": ("kernels on a GPU", "comes with torch's builds for Linux with a GPU"),
    "ffcv": ("--pipeline ffcv", INSTALL_FFCV),
    "nvidia.dali": ("--pipeline dali", INSTALL_DALI),
    "sparseconvnet": ("--sparse_conv=1", "docs/explanation/how_it_works.md, True sparse convolutions"),
    "wandb": ("--wandb", "pip install 'spark-fast[wandb]'"),
    "matplotlib": (command("plot"), "pip install 'spark-fast[plots]'"),
}
SAMPLE = 256 * 2**20  # bytes read or written to tell a disk's speed
OPEN_FILES = 1024
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
ABSENT, BROKEN = "not installed", "cannot be imported"


@dataclass
class Finding:
    """One line of the table."""

    what: str
    found: str
    advice: str = ""  # empty: nothing to do
    needed: bool = False  # training cannot run as it is
    rate: float = 0.0  # bytes a second, where that was measured


def doctor(
    data_path: Annotated[str, tyro.conf.arg(metavar="PATH")] = "",
    exp_dir: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path(),
    in_chans: int = 3,
    input_size: int = 224,
    workers: int = 0,
    cache_dir: str = "",
    cache_size: str = "50GB",
) -> int:
    """Check what this machine supports, and what to install or set.

    Args:
        data_path: Also measure how fast these images are read, decoded and resized, and what limits the loader: a
            folder, a file list, shards, or the URL of shards.
        exp_dir: Folder for runs; its free space and speed are checked.
        in_chans: Channels of the images at data_path.
        input_size: Side in pixels to which they are resized.
        workers: Number of decoding threads to measure; 0: one per core.
        cache_dir: Where shards of a data_path on a server are kept, as in training.
        cache_size: At most so much of them.
    """
    if input_size < 1:
        raise SettingsError(f"--input_size must be positive, got {input_size}")
    if workers < 0:
        raise SettingsError(f"--workers must not be negative, got {workers}")
    findings = [*packages()]
    broken = next((package for package in IMPORTED if _is_missing(_load(package))), "")
    if broken:
        findings.append(Finding(f"importing {broken}", _load(broken), IMPORTED[broken], needed=True))
    if broken != "torch":
        findings += [*devices(), *decoders()]
    findings += [*optional_parts(), *limits(), written_to(exp_dir)]
    if data_path and not broken:
        asked = {"in_chans": in_chans, "input_size": input_size, "workers": workers or usable_cores()}
        findings += images_at(data_path, **asked, cache_dir=cache_dir, cache_size=cache_size)
    elif data_path and "://" not in data_path:
        findings.append(read_from(Path(data_path)))
    table = Table(show_lines=False)
    for title in ("", "found"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        style = "red" if finding.needed else "yellow" if finding.advice else ""
        table.add_row(*map(escape, (finding.what, finding.found)), style=style)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as text:  # rich would end the process by itself where nobody reads its output
        console.print(table)
    print(text.get(), end="")
    for finding in findings:
        if finding.advice:  # a line each, however long: commands are there to be copied whole
            print(f"{finding.what}: {finding.advice}")
    missing = [finding.what for finding in findings if finding.needed]
    print(f"missing: {', '.join(missing)}" if missing else "training can run here")
    return 1 if missing else 0


def packages() -> Iterator[Finding]:
    """Python and what `pip install spark-fast` brings, against the versions it asks for."""
    new_enough = sys.version_info >= (3, 10)
    yield Finding("Python", platform.python_version(), "" if new_enough else "3.10 or newer", not new_enough)
    try:
        wanted = [line for line in requires("spark-fast") or [] if ";" not in line]
    except PackageNotFoundError:
        yield Finding("spark-fast", "not installed", "pip install -e . in the checkout", needed=True)
        return
    for line in wanted:
        name, lowest = re.split(r"\s*>=\s*", line)
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, "missing", f"pip install '{line}'", needed=True)
            continue
        old = _numbers(found) < _numbers(lowest)
        yield Finding(name, found, f"pip install '{line}'" if old else "", needed=old)


def devices() -> Iterator[Finding]:
    """GPUs, and the compiler of torch.compile."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(i)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
            yield Finding(f"GPU {i}", f"{of.name}, {of.total_memory / 2**30:.0f} GiB, {bf16}")
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("GPU", f"none; {built}", "training runs on the CPU")
    yield Finding("CPU", f"{os.cpu_count()} cores, bf16 {'native' if _native_bf16() else 'emulated: use fp32'}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    yield Finding("C++ compiler", compiler or "none", "" if compiler else "apt-get install g++, for --compile on a CPU")


def decoders() -> Iterator[Finding]:
    """JPEG decoders, tried on a small picture: libjpeg-turbo (simplejpeg), which all need, and nvJPEG (torchvision)."""
    import torch

    jpeg = b""
    try:
        import numpy as np
        import simplejpeg

        jpeg = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
        simplejpeg.decode_jpeg(jpeg)
        yield Finding("libjpeg-turbo", "decodes")
    except (ImportError, OSError, ValueError) as error:
        yield Finding("libjpeg-turbo", f"{BROKEN}: {error}", "pip install --force-reinstall simplejpeg", needed=True)
    if not torch.cuda.is_available():
        yield Finding("nvJPEG", "no GPU")
        return
    try:
        from torchvision.io import decode_jpeg

        decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), device="cuda")
        yield Finding("nvJPEG", "decodes")
    except (ImportError, RuntimeError, ValueError) as error:
        told = str(error).splitlines()[0]
        yield Finding("nvJPEG", told, "for --decode device: a torchvision built for torch's version of CUDA")


def optional_parts() -> Iterator[Finding]:
    """What not everybody needs."""
    for module, (purpose, remedy) in OPTIONAL.items():
        found = _load(module)
        yield Finding(module, found, f"for {purpose}: {remedy}" if _is_missing(found) else "")


def _load(module: str) -> str:
    """Its version, or why there is none."""
    try:
        return str(getattr(importlib.import_module(module), "__version__", "yes"))
    except Exception as error:  # a broken package may raise anything
        absent = isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?")
        return ABSENT if absent else f"{BROKEN}: {error}"


def _is_missing(found: str) -> bool:
    return found == ABSENT or found.startswith(BROKEN)


def limits() -> Iterator[Finding]:
    """Open files (every shard is one, and every connection between ranks), and shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("open files", f"{soft} of at most {hard}", f"ulimit -n {hard}" if soft < OPEN_FILES else "")
    if SHARED_MEMORY.exists():
        size = shutil.disk_usage(SHARED_MEMORY).total
        advice = "several GPUs (NCCL) need 1 GiB: docker run --shm-size=1g" if size < 2**30 else ""
        yield Finding("shared memory", f"{size / 2**20:.0f} MiB", advice)


def written_to(folder: Path) -> Finding:
    """Room and speed of the disk that runs are written to."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    what = f"disk of {folder}"
    probe = place / f".spark_fast_doctor_{os.getpid()}"
    size = min(SAMPLE, shutil.disk_usage(place).free // 2)
    start = time.perf_counter()
    try:
        with probe.open("wb") as file:
            file.write(os.urandom(2**20) * (size // 2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(what, str(error), "choose another --exp_dir", needed=True)
    finally:
        probe.unlink(missing_ok=True)
    rate = size / 2**20 / (time.perf_counter() - start)
    free = shutil.disk_usage(place).free / 2**30
    advice = "a checkpoint of ResNet-50 is 0.6 GB, of ConvNeXt-L 3 GB" if free < 10 else ""
    return Finding(what, f"{free:.0f} GiB free, written at {rate:.0f} MB/s", advice)


def images_at(data_path: str, **asked: Any) -> Iterator[Finding]:
    """How fast the images there are read and loaded; `asked`: of the `LoaderOptions`."""
    from spark_fast.cli.storage_speed import listed_files
    from spark_fast.pipelines.options import LoaderOptions, View
    from spark_fast.pipelines.sources.remote.url import is_remote, refuse_credentials

    refuse_credentials(data_path)
    options = LoaderOptions(32, max_bad_fraction=1.0, **asked)
    path = Path(data_path).expanduser()
    if is_remote(data_path):
        options = replace(options, view=View(shuffle_block=1))  # no need of all shards at once
        read = fetched_from(data_path, options)
    else:
        try:
            read = read_from(path, listed_files(path))
        except SparkFastError as error:
            read = Finding(f"images at {path}", str(error), "see the reason", needed=True)
    yield read
    if not read.needed:
        yield from loaded_from(data_path, read.rate or None, options)


def read_from(data_path: Path, files: Iterable[Path] | None = None) -> Finding:
    """How fast files are read, from the disk where the system lets its cache be dropped; by default all at a path."""
    what, files = f"images at {data_path}", _files(data_path) if files is None else files
    count = read = 0
    unreadable: list[str] = []
    start = time.perf_counter()
    for path in files:
        try:
            read += len(_from_disk(path, SAMPLE - read))
            count += 1
        except OSError as error:
            unreadable.append(f"{path} ({error.strerror})")
        if read >= SAMPLE:
            break
    failed = f"not read, {len(unreadable)}: the first is {unreadable[0]}" if unreadable else ""
    if not read:
        why = failed or ("nothing to read" if data_path.exists() else "there is no such file or folder")
        return Finding(what, why, "check --data_path", needed=True)
    seconds = time.perf_counter() - start
    small = read / count < 2**20
    advice = f"many small files: convert them into shards with {command('convert')}" if small else ""
    speed = f"{read / 2**20 / seconds:.0f} MB/s, {count / seconds:.0f} files/s"
    return Finding(what, "; ".join(filter(None, (speed, failed))), advice, rate=read / seconds)


def fetched_from(url: str, options: LoaderOptions) -> Finding:
    """How fast shards come from a server into the cache."""
    from spark_fast.cli.storage_speed import fetch_sample

    what = f"shards at {url}"
    try:
        found = fetch_sample(url, options, SAMPLE)
    except SparkFastError as error:
        return Finding(what, str(error), "see the reason", needed=True)
    if not found.bytes:
        return Finding(what, f"the first {found.shards} are in the cache {found.folder} already")
    rate = found.bytes / found.seconds
    told = f"{rate / 2**20:.0f} MB/s into the cache {found.folder}, {found.shards} shards"
    return Finding(what, told, rate=rate)


def loaded_from(data_path: str, storage: float | None, options: LoaderOptions) -> Iterator[Finding]:
    """How long an image takes one core, how many the loader gives, and what limits it; `storage`: bytes a second."""
    from spark_fast.cli.loader_speed import loader_speed

    try:
        speed = loader_speed(data_path, options)
    except SparkFastError as error:
        yield Finding("loading them", str(error), "see the reason", needed=True)
        return
    parts = {"reading": speed.reading, "decoding": speed.decoding, "resizing": speed.resizing}
    told = ", ".join(f"{name} {seconds * 1000:.2f} ms" for name, seconds in parts.items())
    yield Finding("an image on one core", f"{told}: {speed.of_one_core:.0f} images/s")
    limit, remedy = speed.limit(storage)
    yield Finding(f"loader, {options.workers} threads", f"{speed.rate:.0f} images/s, limited by {limit}", remedy)


def _files(data_path: Path) -> Iterator[Path]:
    if data_path.is_file():
        yield data_path
    for folder, folders, names in os.walk(data_path):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def _from_disk(path: Path, most: int) -> bytes:
    """At most so many bytes of a file, from the disk where the system lets its cache be dropped; of a pipe none."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would be waited for
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return b""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read(most)


def _numbers(text: str) -> tuple[int, ...]:
    """(2, 14, 1) of 2.14.1+cu130."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def _native_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool(re.search(r"avx512_bf16|amx_bf16|\bbf16\b", cpuinfo.read_text(encoding="utf-8")))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_tool("doctor", doctor, argv)


if __name__ == "__main__":
    sys.exit(start("doctor"))
