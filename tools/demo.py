"""The demo: pictures -> shards -> a small SparK pre-training -> what came of it. Run by tools/demo.sh.

    python tools/demo.py [--data_path FOLDER] [--out demo_run] [any flag of spark-fast-train]

Every part is the real command, run as a person would run it. Each of them knows what it has done already, so the
demo can be stopped with Ctrl-C and run again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
INTERRUPTED = 75  # exit code of spark-fast-train: stopped early, everything is saved

# Chosen so that two CPU cores see the loss fall in three minutes; flags of the user come later and win.
TRAINING = {
    "--model": "resnet18",
    "--input_size": "128",
    "--decoder_width": "128",
    "--batch_size": "16",
    "--epochs": "14",
    "--warmup_epochs": "1",
    "--optimizer": "adamw",  # LAMB is for large batches; at the rates tried, AdamW came further in these few steps
    "--base_lr": "0.032",
    "--workers": "2",
    "--log_every": "8",
}


class CommandError(Exception):
    """A command of the demo ended with another exit code than 0."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def demo(out: Path, data_path: Path | None, pictures: Sequence[str], training: Sequence[str]) -> None:
    """Make, convert, train, tell.

    Args:
        out: everything goes there: images/, shards/ and run/.
        data_path: the user's images instead of made ones.
        pictures: arguments for make_images.py.
        training: more flags for spark-fast-train.

    Raises:
        CommandError: a command failed or was stopped; it has said why.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / ".gitignore").write_text("*\n", encoding="utf-8")  # the folder may well lie in somebody's checkout
    if data_path is None:
        _title("1. pictures")
        data_path = out / "images"
        run([sys.executable, str(TOOLS / "make_images.py"), str(data_path), *pictures])
    _title("2. shards")
    run([sys.executable, str(TOOLS / "convert_imagenet.py"), str(data_path), str(out / "shards")])
    _title("3. pre-training")
    folder = out / "run"
    before = len(read_metrics(folder))
    flags = [word for pair in TRAINING.items() for word in pair]
    where = ["--data_path", str(out / "shards"), "--exp_dir", str(folder), "--resume", "auto"]
    run([sys.executable, "-m", "spark_fast.train", "demo", *flags, *where, *training])
    rows = read_metrics(folder)
    if len(rows) == before:
        print("This run was already complete.")
    _title("4. results")
    print(summary(folder, rows))


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(command: Sequence[str]) -> None:
    """Run a command on this terminal to its end.

    In a session of its own, a terminal's Ctrl-C reaches this process alone, which passes it on: the command gets
    each signal once, however it was sent, and is never killed while it writes its checkpoint.

    Raises:
        CommandError: it did not end with 0.
    """
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    child = subprocess.Popen(command, start_new_session=True)
    before = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in stops}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        raise CommandError(code if code > 0 else 128 - code)


def read_metrics(folder: Path) -> list[dict]:
    """The log points of a run so far, oldest first."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def summary(folder: Path, rows: Sequence[dict]) -> str:
    """The figures of a run and where its results are."""
    seconds, waited, before = 0.0, 0.0, 0
    for row in rows:  # in units of the batch: it is the same all along and cancels out
        spent = (row["step"] - before) / row["images_per_second"]
        seconds, waited, before = seconds + spent, waited + spent * row["data_wait"], row["step"]
    pictures = sorted((folder / "reconstruction").glob("*.png"))
    lines = {
        "loss": f"{rows[0]['loss']:.2f} -> {rows[-1]['loss']:.2f} in {before} steps",
        "speed": f"{before / seconds:.1f} images/s, {waited / seconds:.1%} of the time waiting for data",
        "picture": f"{pictures[-1] if pictures else 'none'} (image, visible patches, prediction)",
        "weights": ", ".join(str(path) for path in folder.glob("*_timm.safetensors")),
        "curves": f"{sys.executable} -m tensorboard.main --logdir {folder / 'tensorboard'}",
    }
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code, that of the command that failed if one did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_path", type=Path, help="your own image folder instead of generated pictures")
    parser.add_argument("--out", type=Path, default=Path("demo_run"), help="output folder (%(default)s)")
    parser.add_argument("--pictures", type=int, default=512, help="number of pictures to generate (%(default)s)")
    parser.add_argument("--picture_size", type=int, default=256, help="their shorter side (%(default)s)")
    args, training = parser.parse_known_args(argv)
    pictures = [f"--train={args.pictures}", "--val=64", f"--size={args.picture_size}"]
    try:
        demo(args.out, args.data_path, pictures, training)
    except CommandError as error:
        if error.code in (INTERRUPTED, 130):
            print("\nstopped; the same command continues", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 6
    return 0


if __name__ == "__main__":
    sys.exit(main())
