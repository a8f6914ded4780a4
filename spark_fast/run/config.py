"""What the settings of every command have in common, and how a command line becomes a tree of them.

A TOML file is turned into the flags it stands for and put before the command line's own, so a file is checked exactly
as flags are: unknown keys are errors that name the nearest ones.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
import tyro

from spark_fast.errors import SettingsError
from spark_fast.networks import PUBLISHED_MODELS, parse_input_size
from spark_fast.pipelines.options import are_photographs, bytes_of
from spark_fast.pipelines.sources.remote.url import refuse_credentials
from spark_fast.pipelines.transforms.bands.statistics import Statistics

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Values = dict[str | None, str]  # what is said after a flag, None: nothing -> the flag that it stands for


class DataGroup(Protocol):
    """What every command's `data` has."""

    data_path: str
    pipeline: str
    input_size: str
    workers: int
    prefetch: int
    max_bad_fraction: float
    max_pixels: int
    cache_dir: str
    cache_size: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_first: bool
    npz_key: str

    @property
    def worker_processes(self) -> int | Literal["auto"]:
        """Processes for the decoding threads, or auto."""
        ...

    @property
    def scale(self) -> str:
        """How stored values are mapped to [0, 1]."""
        ...

    @property
    def in_chans(self) -> int | None:
        """Channels of the images, None for as many as the weights say."""
        ...


class ModelGroup(Protocol):
    """What every command's `model` has."""

    model: str
    stages: int


class RunGroup(Protocol):
    """What every command's `run` has."""

    exp_name: str
    exp_dir: str
    seed: int
    threads: int
    timeout: float

    @property
    def resume(self) -> str:
        """The checkpoint to resume from, "auto", or ""."""
        ...

    @property
    def device(self) -> str:
        """cuda, cpu or auto."""
        ...


class Tree:
    """Settings in groups, itself a dataclass of dataclasses."""

    data: DataGroup
    model: ModelGroup
    run: RunGroup
    prog: ClassVar[str]  # the command
    images: ClassVar[str]  # what its --data_path takes
    suffix: ClassVar[str] = ""  # of its folder

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the input in pixels."""
        return parse_input_size(self.data.input_size)

    @property
    def in_chans(self) -> int:
        """Channels of the images; three where nothing else is said."""
        return 3 if self.data.in_chans is None else self.data.in_chans

    def scaling(self, known: Statistics | None) -> str:
        """`--scale`; where it is left open, that of the statistics which the weights' run or this one kept."""
        return known.scale if known and self.data.scale == "auto" else self.data.scale

    def photographs(self, known: Statistics | None = None) -> bool:
        """See `are_photographs`; `known`: see `scaling`."""
        return are_photographs(self.in_chans, self.scaling(known))

    @property
    def network(self) -> str:
        """The timm name, "" where none is given."""
        return PUBLISHED_MODELS.get(self.model.model, self.model.model)

    @property
    def folder(self) -> Path:
        """The folder of the run, or of its result."""
        return Path(self.run.exp_dir or f"output_{self.run.exp_name}{self.suffix}")

    def resume_newest(self) -> None:
        """As if --resume auto had been given."""
        self.run.__dict__["resume"] = "auto"

    def to_dict(self) -> dict:
        """Plain nested dictionaries."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]  # each tree is a dataclass

    def to_toml(self) -> str:
        """The tree as a TOML file that `--config` reads back; what is left open is left out."""
        given = {g: {k: v for k, v in values.items() if v is not None} for g, values in self.to_dict().items()}
        return tomli_w.dumps(given)

    def shown(self) -> str:
        """What --print_config prints."""
        return self.to_toml()

    def check(self) -> None:
        """Raise SettingsError for what can be told without looking at data or weights."""
        _ = self.size
        if not self.run.exp_name and not self.run.exp_dir:
            raise SettingsError(f"the run needs a name: {self.prog} <experiment_name> ... (or --exp_dir)")
        if not self.data.data_path and self.data.pipeline != "synthetic":
            raise SettingsError(f"--data_path is missing: {self.images}")
        for path in (self.data.data_path, getattr(self.data, "val_path", "")):
            refuse_credentials(path)
        bytes_of(self.data.cache_size)
        if self.run.seed >= 2**63:  # hashes take 64 bits with a sign; check_numbers refuses negative ones
            raise SettingsError(f"--seed must be below 2**63, got {self.run.seed}")
        if (keep_last := getattr(self.run, "keep_last", 2)) < 2:
            raise SettingsError(f"--keep_last must be 2 or more, because the last one may be damaged; got {keep_last}")

    def check_numbers(
        self, positive: Iterable[str], up_to_one: Iterable[str] = (), below_one: Iterable[str] = ()
    ) -> None:
        """Raise SettingsError for a number that is infinite or below 0, or is not as these sets of names say."""
        for name, value in (item for group in self.to_dict().values() for item in group.items()):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not 0 <= value < math.inf or (name in positive and value == 0):
                must = "be positive" if name in positive else "not be negative"
                raise SettingsError(f"--{name} must {must}, got {value}")
            if name in up_to_one and value > 1:
                raise SettingsError(f"--{name} must be at most 1, got {value}")
            if name in below_one and value >= 1:
                raise SettingsError(f"--{name} must be below 1, got {value}")


T = TypeVar("T", bound=Tree)

log = logging.getLogger("spark_fast")

CONFIGS = Path(__file__).parents[1] / "configs"  # as installed; in a checkout a link to the folder at its top


def read(
    kind: type[T], argv: list[str], switches: dict[str, Values], defaults: Callable[[list[str]], T] | None = None
) -> T:
    """Settings from a command line, [NAME] --flag ...: defaults < `--config file.toml` < flags.

    Args:
        switches: flags with values of their own, see `plain_switches`.
        defaults: the settings that the flags change, which may depend on them; None: those of the class.

    Raises:
        SettingsError: a value that cannot be used.
        SystemExit: after --help or --print_config (0), or for an unknown flag (2; tyro names the nearest ones).
    """
    if argv and not argv[0].startswith("-"):
        argv = [f"--exp_name={argv[0]}", *argv[1:]]
    config, argv = take_option(argv, "--config")
    rate, argv = take_option(argv, "--lr")
    if rate is not None:
        log.warning("--lr %s is ignored, as in the published code: the rate is --base_lr times --bs / 256", rate)
    show = "--print_config" in argv
    argv = [a for a in argv if a != "--print_config"]
    flags = _flags_of(find_config(config), kind()) if config is not None else []
    words = plain_switches(flags + argv, switches)
    settings = tyro.cli(
        kind,
        args=words,
        default=kind() if defaults is None else defaults(words),
        prog=kind.prog,
        description=f"{kind.__doc__}\n\n--config reads settings from a TOML file, or from one that comes with"
        " spark_fast, such as spark/resnet50; --print_config prints them.",
        use_underscores=True,
    )
    if show:
        print(settings.shown(), end="")
        raise SystemExit(0)
    settings.check()
    return settings


def set_by_name(settings: Tree, given: Mapping[str, object]) -> None:
    """Set values by their names alone, from Python; a size (H, W) and paths may be given as such.

    Raises:
        TypeError: a name that is no setting, with the nearest ones.
        SettingsError: a value of another type, or none of those that there are.
    """
    groups = [getattr(settings, f.name) for f in dataclasses.fields(settings)]  # type: ignore[arg-type]
    home = {f.name: group for group in groups for f in dataclasses.fields(group)}
    for name, value in given.items():
        if name not in home:
            raise TypeError(f"{name!r} is not a setting{_meant(name, home)}")
        hint = get_type_hints(type(home[name]))[name]
        kind, *words = get_args(hint) if get_origin(hint) is Union else (hint,)  # a number, or a word like "auto"
        if any(value in get_args(word) for word in words):
            setattr(home[name], name, value)
            continue
        if kind is str and isinstance(value, (tuple, list)):
            value = "x".join(map(str, value))
        elif kind is str and isinstance(value, (int, Path)) and not isinstance(value, bool):
            value = str(value)
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if get_origin(kind) is tuple:
            value = _numbers_of(name, kind, value)
        elif get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise SettingsError(f"{name} must be one of {', '.join(map(repr, get_args(kind)))}, got {value!r}")
        elif type(value) is not kind:
            raise SettingsError(f"{name} must be of type {kind.__name__}, got {value!r}")
        setattr(home[name], name, value)


def _numbers_of(name: str, kind: object, value: object) -> tuple[float, ...]:
    """A setting of several numbers, `tuple[int, ...]` or `tuple[float, ...]`, given as a list or a tuple."""
    number = get_args(kind)[0]
    taken = {number, int}  # 1 is a float as well
    if not isinstance(value, (list, tuple)) or any(type(v) not in taken for v in value):
        raise SettingsError(f"{name} must be a list of {number.__name__}, got {value!r}")
    return tuple(map(number, value))


def switch(on: str, off: str) -> Values:
    """The values of a switch: none, 1 and true stand for the flag `on`, 0 and false for `off`."""
    return {None: on, "1": on, "true": on, "0": off, "false": off}


def switches_of(*names: str) -> dict[str, Values]:
    """The switches --name, turned off by --no_name."""
    return {f"--{name}": switch(f"--{name}", f"--no_{name}") for name in names}


def plain_switches(argv: list[str], switches: dict[str, Values]) -> list[str]:
    """--sbn=1, --sbn True and the like become --sbn, and --sbn=0 becomes --no_sbn: old command lines run."""
    out: list[str] = []
    open_values: Values = {}  # of the switch that came last, if it had none
    for word in argv:
        if word.lower() in open_values:
            out[-1], open_values = open_values[word.lower()], {}
            continue
        flag, has_value, value = word.partition("=")
        values = switches.get(flag[:2] + flag[2:].replace("-", "_"), {})
        out.append(values.get(value.lower() if has_value else None, word))
        open_values = {} if has_value else values
    return out


def nearest(word: str, known: Iterable[str]) -> str:
    """What may have been meant, as the end of an error's message."""
    near = get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else f"; choose one of {', '.join(sorted(known))}"


def _meant(word: str, home: Mapping[str, object]) -> str:
    """As `nearest`, but a short name of the command line is told by its long one; `home`: setting -> its group."""
    for name, group in home.items():
        hint = get_type_hints(type(group), include_extras=True)[name]
        if any(f"--{word}" in (getattr(part, "aliases", None) or ()) for part in get_args(hint)[1:]):
            return f": it is --{word} on the command line, {name} here"
    return nearest(word, home)


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option (None: it is not there), and the words without it."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith(name + "="):
            return word.partition("=")[2], argv[:i] + argv[i + 1 :]
    return None, argv


def last_value(words: list[str], flag: str, default: str) -> str:
    """What a flag is set to, by the last time that it is there: `--flag value` or `--flag=value`."""
    for i in range(len(words) - 1, -1, -1):
        name, given, value = words[i].partition("=")
        if name == flag and (given or i + 1 < len(words)):
            return value if given else words[i + 1]
    return default


def find_config(name: str) -> Path:
    """The file that `--config` means: a path, or one that comes with spark_fast, as `spark/resnet50`.

    Raises SettingsError, with the nearest names, if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in CONFIGS.glob("*/*.toml")}
    if name in known:
        return known[name]
    raise SettingsError(
        f"there is no configuration file {name}, nor one of this name in spark_fast{nearest(name, known)}"
    )


def _flags_of(path: Path, known_settings: Any) -> list[str]:
    """The flags that a TOML file stands for, of a settings tree of dataclasses."""
    try:
        tree: dict[str, object] = tomllib.loads(_text_of(path.read_bytes()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"configuration file {path} cannot be read: {error}") from None
    flags = []
    for section, values in tree.items():
        names = {f.name for f in dataclasses.fields(known_settings)}
        if section not in names or not isinstance(values, dict):
            raise SettingsError(f"{path}: [{section}] is not a section; choose one of {', '.join(sorted(names))}")
        group = getattr(known_settings, section)
        known = {f.name: group for f in dataclasses.fields(group)}
        for key, value in values.items():
            if key not in known:
                raise SettingsError(f"{path}: [{section}] has no setting {key!r}{_meant(key, known)}")
            several = isinstance(value, list)  # as `--key 1 2 3`
            flags += [f"--{key}", *map(str, value)] if several else [f"--{key}={value}"]
    return flags


def _text_of(raw: bytes) -> str:
    """UTF-8 in every locale; paths that the locale cannot encode become what the command line would have been."""
    text = raw.decode("utf-8")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return os.fsdecode(raw)
    return text
