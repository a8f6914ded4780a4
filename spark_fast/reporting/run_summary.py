"""The summary of a run before its first step, whether it can learn, and at its end whether it has."""

from __future__ import annotations

from dataclasses import dataclass

FEW_PATCHES = 9  # of an image: a grid of 3 x 3
# benchmarks/README.md: after 2343 steps a network fine-tunes better for its pre-training, after 312 it hardly does
FEW_STEPS = 1000
NOTHING_LEARNED = 0.98  # loss; 1.0 is that of predicting the mean of each patch
PAGE = "docs/tutorials/small_data.md"


@dataclass(frozen=True)
class RunSummary:
    """A run as it is about to begin.

    Attributes:
        parameters: of encoder and decoder.
        grid: patches, (rows, columns); patch: (height, width) in pixels; masked: patches of an image.
        step: where this process begins.
        warmup_is_chosen: by a setting; else it follows from the epochs.
        masks: of each image; in_chans: its channels.
        evaluation: what is evaluated while it trains, "" for nothing, every `eval_every` epochs.
    """

    device: str
    precision: str
    ranks: int
    network: str
    parameters: tuple[int, int]
    drop_path: float
    grid: tuple[int, int]
    patch: tuple[int, int]
    masked: int
    images: int
    batch_size: int
    steps_per_epoch: int
    epochs: int
    step: int
    warmup_epochs: float
    warmup_is_chosen: bool
    peak_lr: float
    method: str
    masks: int
    evaluation: str = ""
    eval_every: int = 0
    in_chans: int = 3

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Of them, those in which the learning rate rises."""
        return round(self.warmup_epochs * self.steps_per_epoch)

    @property
    def patches(self) -> int:
        """Of an image."""
        return self.grid[0] * self.grid[1]

    def text(self) -> str:
        """A line for each part."""
        encoder, decoder = (f"{n / 1e6:.1f} M" for n in self.parameters)
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        tenth = "" if self.warmup_is_chosen else f", {self.warmup_epochs:g} epochs by default; --warmup_epochs sets it"
        channels = f", of {self.in_chans} channel{'s' * (self.in_chans != 1)}" if self.in_chans != 3 else ""
        begun = f", of which {self.step} are done" if self.step else ""
        rows = {
            "device": f"{self.device}, {self.precision}{ranks}",
            "method": self.method + (f", {self.masks} masks per image" if self.masks > 1 else ""),
            "network": f"{self.network}: {encoder} parameters in the encoder, {decoder} in the decoder; "
            f"stochastic depth {self.drop_path:g}",
            "patches": f"{self.grid[0]}x{self.grid[1]} of {self.patch[0]}x{self.patch[1]} px, "
            f"{self.masked} of {self.patches} masked",
            "images": f"{self.images}, {self.batch_size} per step{channels}",
            "steps": f"{self.total_steps} ({self.epochs} epochs of {self.steps_per_epoch}){begun}",
            "warm-up": f"{self.warmup_steps} steps{tenth}",
            "peak rate": f"{self.peak_lr:.3g}",
        }
        if self.evaluation:
            often = "epoch" if self.eval_every == 1 else f"{self.eval_every} epochs"
            rows["evaluation"] = f"{self.evaluation}; before step 1, every {often} and after the last"
        return "\n".join(f"  {name:<11} {text}" for name, text in rows.items())

    def doubts(self) -> list[str]:
        """Why this run may learn little, a sentence each; [] where nothing speaks against it."""
        found = []
        if self.patches <= FEW_PATCHES:
            found.append(
                f"an image has {self.patches} patches, of which {self.masked} are masked: the visible ones say little "
                f"about the rest. Lower --stages for smaller patches, or raise --input_size for more of them"
            )
        if doubt := long_warmup(self.warmup_steps, self.total_steps):
            found.append(doubt)
        if self.total_steps < FEW_STEPS:
            found.append(
                f"{self.total_steps} steps are few; pre-training begins to pay at about {FEW_STEPS}. Raise --epochs or "
                f"lower --batch_size; {PAGE} has settings for few images"
            )
        return found


def long_warmup(steps: float, total_steps: int) -> str:
    """What to say of a warm-up that takes half of a run or more; "" of a shorter one."""
    if 2 * steps < total_steps:
        return ""
    return (
        f"warm-up takes {min(round(steps), total_steps)} of the {total_steps} steps, so the learning rate hardly "
        f"reaches its peak. Lower --warmup_epochs, or raise --epochs"
    )


def nothing_learned(loss: float) -> str:
    """What to say of a finished run with this last loss; "" where it has learned something."""
    if not loss > NOTHING_LEARNED:
        return ""
    return (
        f"the final loss is {loss:.4f}, and predicting only the mean of each patch gives 1: this run has learned "
        f"almost nothing. Use more steps or a higher --base_lr; {PAGE} has tested settings"
    )
