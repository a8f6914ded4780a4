"""Where two runs of one network first differ: at a layer, or in the code of a `forward` between two of its layers.

Both runs are recorded: the input and output of every call of every module as dense maps, and the torch functions that
the code between them calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Call = tuple[str, int]  # the path of a module, and which of its calls it is, from 0
LOOKS = {"size", "dim", "stride", "numel", "is_floating_point", "is_contiguous", "contiguous", "clone"}
LAYERS = {  # functions -> the layers in their place that can be packed
    "mean": "nn.AdaptiveAvgPool2d(1)",
    "adaptive_avg_pool2d": "nn.AdaptiveAvgPool2d(1)",
    "interpolate": "nn.Upsample",
    "pad": "nn.ZeroPad2d",
    "conv2d": "nn.Conv2d",
    "max_pool2d": "nn.MaxPool2d",
    "avg_pool2d": "nn.AvgPool2d",
    "group_norm": "nn.GroupNorm",
    "instance_norm": "nn.InstanceNorm2d",
    "dropout": "nn.Dropout",
}
NAMED = 4  # functions that a message names at most


@dataclass
class Record:
    """A run of a network.

    Attributes:
        maps: call -> its input and its outputs, dense maps (B, C, H, W), in the order of completion.
        events: ("enter", "leave" or "function", the module's path, the function's name).
    """

    maps: dict[Call, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)
    events: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """Where two runs first differ.

    Attributes:
        path: of the module, "" for the network itself.
        own_code: the code of its `forward` differs, none of its layers.
        before, after: the layers between which that code stands; "": it is the first, or the last.
        functions: those that it calls there.
    """

    path: str
    own_code: bool = False
    after: str = ""
    before: str = ""
    functions: tuple[str, ...] = ()

    def place(self, network: nn.Module) -> str:
        """The place, in words."""
        owner = type(network.get_submodule(self.path)).__name__
        if not self.own_code:
            return _layer(network, self.path)
        code = f"the code of `{self.path}`" if self.path else "the network's own code"
        if self.after and self.before:
            where = f"between {_layer(network, self.after)} and {_layer(network, self.before)}"
        elif self.before:
            where = f"before its first layer, {_layer(network, self.before)},"
        else:
            where = f"after its last layer, {_layer(network, self.after)},"
        return f"{code} ({owner}.forward) {where}"

    def fault(self, otherwise: str) -> str:
        """What it does there, in words."""
        drawn = any(name.startswith(("rand", "dropout", "bernoulli", "normal")) for name in self.functions)
        calls = f" (it calls {', '.join(self.functions)})" if self.functions else ""
        return f"{'draws random numbers' if drawn else otherwise}{calls}"

    @property
    def remedy(self) -> str:
        """What to do, in words."""
        if not self.own_code:
            return "It does not behave as the kind it is registered as: see spark_fast.encoder.register"
        if "scaled_dot_product_attention" in self.functions:
            return "Attention cannot be packed: leave it out"
        known = ", ".join(f"{LAYERS[name]} for {name}" for name in self.functions if name in LAYERS)
        use = f"use {known}, or wrap" if known else "wrap"
        image = ". Or do it to the images, before the network" if not self.path and not self.after else ""
        return (
            f"Packing sees layers, not the code between them: {use} that code in a module and register its kind with "
            f"spark_fast.encoder.register{image}"
        )


def _layer(network: nn.Module, path: str) -> str:
    return f"`{path or 'the network itself'}` ({type(network.get_submodule(path)).__name__})"


@contextmanager
def recorded(network: nn.Module, dense: Callable[[Tensor], Tensor]) -> Iterator[Record]:
    """Record what `network` does meanwhile.

    Args:
        dense: a map (B, C, H, W) of this run as one that can be compared with the other run's.
    """
    record, stack, hooks = Record(), [""], ExitStack()
    calls: Counter[str] = Counter()

    def maps(value: object) -> list[Tensor]:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        with torch._C.DisableTorchFunction():
            return [dense(item) if isinstance(item, Tensor) and item.dim() == 4 else torch.empty(0) for item in items]

    for path, module in network.named_modules():
        entered: list[list[Tensor]] = []  # inputs are taken at once: a layer may work in place

        def enter(_: nn.Module, inputs: tuple, path: str = path, entered: list = entered) -> None:
            stack.append(path)
            record.events.append(("enter", path, ""))
            entered.append(maps(inputs[:1]))

        def leave(_: nn.Module, __: tuple, output: object, path: str = path, entered: list = entered) -> None:
            stack.pop()
            record.events.append(("leave", path, ""))
            record.maps[path, calls[path]] = entered.pop(), maps(output)
            calls[path] += 1

        hooks.enter_context(module.register_forward_pre_hook(enter))
        hooks.enter_context(module.register_forward_hook(leave))

    class Functions(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            record.events.append(("function", stack[-1], getattr(func, "__name__", "")))
            return func(*args, **(kwargs or {}))

    with hooks, Functions():
        yield record


def first_difference(one: Record, other: Record, differs: Callable[[Tensor, Tensor], bool]) -> Difference | None:
    """The first place, in the order of execution, where `other` differs from `one`; None: nowhere.

    `differs(map of other, map of one)` compares two (B, C, H, W).
    """

    def wrong(call: Call, side: int) -> bool:
        pairs = zip(one.maps[call][side], other.maps[call][side], strict=False)
        return any(_comparable(a, b) and differs(b, a) for a, b in pairs)

    for call in one.maps:
        if call not in other.maps:
            continue
        path, number = call
        if not wrong(call, 0):
            if not wrong(call, 1):
                continue
            children = [e for e in one.events if e[0] == "leave" and _parent(e[1]) == path and e[1]]
            return _in_code(one, path, len(one.events), "") if children else Difference(path)
        # a container may only pass a wrong input on: blame the code that made the input of the outermost such module
        while path and (_parent(path), number) in one.maps and wrong((_parent(path), number), 0):
            path = _parent(path)
        entries = [i for i, e in enumerate(one.events) if e[:2] == ("enter", path)]
        return _in_code(one, _parent(path), entries[number if number < len(entries) else 0], path)
    return None


def _in_code(record: Record, path: str, end: int, before: str) -> Difference:
    """The code of a module's `forward` that ran last before an event, the entering of `before` or the end of all."""
    functions: list[str] = []
    after = ""
    ends = [i for i, e in enumerate(record.events[:end]) if e[:2] == ("leave", path)]
    for what, where, name in reversed(record.events[: ends[-1] if ends and not before else end]):
        if what == "function" and where == path:
            functions.append(name)
        elif where and where != path and _parent(where) == path:
            after = where
            break
        elif where == path:
            break
    seen = dict.fromkeys(n for n in reversed(functions) if not n.startswith("__") and n not in LOOKS)
    return Difference(path, True, after, before, tuple(seen)[-NAMED:])


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _comparable(a: Tensor, b: Tensor) -> bool:
    return a.dim() == 4 == b.dim() and a.shape[:2] == b.shape[:2] and all(
        m == n or 1 in (m, n) for m, n in zip(a.shape[2:], b.shape[2:], strict=True)
    )  # fmt: skip
