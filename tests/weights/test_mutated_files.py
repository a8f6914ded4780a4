"""Whatever a file of weights has become, it is loaded whole or refused in words: no other error, no code, no part."""

import io
import json
import random
import struct
import zipfile
from functools import partial

import pytest
import torch
from safetensors.torch import save as save_safetensors

from spark_fast.errors import SparkFastError
from spark_fast.weights.load import load_into_network, load_into_spark
from spark_fast.weights.read import read_weights
from spark_fast.weights.spark_keys import spark_state_dict
from tests.weights.tiny import TwoConvolutions, tiny_spark

WHOLE = {
    name: value + 0.5 if value.is_floating_point() else value
    for name, value in spark_state_dict(tiny_spark(seed=1)).items()
}
PREFIX = "sparse_encoder.sp_cnn."
ENCODER = {name.removeprefix(PREFIX): value for name, value in WHOLE.items() if name.startswith(PREFIX)}
TOUCHED = []


def touch(*words):
    TOUCHED.append(words)


class Hostile:
    """A pickle of it calls a function of this file when it is read."""

    def __reduce__(self):
        return touch, ("hostile",)


# -- of a state dict: what another program, or a mistake, may leave


def a_tensor(state, rng):
    return rng.choice([name for name, value in state.items() if isinstance(value, torch.Tensor)] or ["none"])


def renamed(state, rng):
    old = a_tensor(state, rng)
    new = rng.choice([old.upper(), f"{old}.", f".{old}", old.replace(".", "_"), "", f"module.{old}", f"a.{old}"])
    return {new if name == old else name: value for name, value in state.items()}


def less(state, rng):
    return {name: state[name] for name in rng.sample(list(state), rng.randrange(len(state) + 1))}


def reshaped(state, rng):
    name = a_tensor(state, rng)
    shape = tuple(state[name].shape) if name in state else ()
    shape = rng.choice([other for other in ((0,), (1,), (3, 3), (*shape, 1), shape[::-1], ()) if other != shape])
    return state | {name: torch.zeros(shape)}


def retyped(state, rng):
    name = a_tensor(state, rng)
    kind = rng.choice([torch.int8, torch.bool, torch.half, torch.bfloat16, torch.double, torch.complex64, "meta"])
    return state | {name: state.get(name, torch.zeros(1)).to(kind)}


def spoilt(state, rng):
    name = a_tensor(state, rng)
    value = state.get(name, torch.zeros(1)).double().flatten()
    value[: rng.randrange(1, 3)] = rng.choice([torch.nan, torch.inf, -torch.inf])
    return state | {name: value.float().view_as(state.get(name, value))}


def filled(state, rng):
    other = rng.choice([None, 3, "text", [1, 2], {"a": 1}, {"b": torch.zeros(2)}, b"bytes", float("nan")])
    return state | {rng.choice([*state, "more", 5]): other}


def shifted(value):
    return value + 1 if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def doubled(state, rng):
    return state | {f"module.{name}": shifted(value) for name, value in state.items()}


def prefixed(state, rng):
    prefix = rng.choice(["model.", "module.", "backbone.", "_orig_mod.", "net.trunk.", "encoder.", "module.encoder_q."])
    return {f"{prefix}{name}": value for name, value in state.items()}


STATES = [renamed, less, reshaped, retyped, spoilt, filled, doubled, prefixed]


# -- of a file's content: where the state lies in it, and what lies beside


def nested(state, rng):
    key = rng.choice(["state_dict", "model", "module", "teacher", "net", "a.b", ""])
    return {key: state if rng.random() < 0.7 else nested(state, rng), "epoch": rng.choice([1, "one", None])}


def two(state, rng):
    return {"student": state, "teacher": {name: shifted(value) for name, value in state.items()}}


def odd_meta(state, rng):
    odd = [
        None,
        3,
        -1,
        "x",
        [],
        {},
        [64],
        [0, -5],
        True,
        {"model": 3},
        {"model": {"model": "resnet18"}},
        torch.zeros(1),
    ]
    keys = ["arch", "input_size", "settings", "format", "epoch", "step", "loss", "optimizer", "is_pretrain", "config"]
    return {"module": state, **{key: rng.choice(odd) for key in rng.sample(keys, 4)}}


def endless(state, rng):
    content = {"state_dict": dict(state)}
    content["state_dict"]["again"] = content
    return content


def hostile(state, rng):
    return {"state_dict": state, rng.choice(["a", "optimizer"]): Hostile()}


def no_dictionary(state, rng):
    return rng.choice([list(state.values()), torch.zeros(3), None, 5, "text", list(state.items())])


CONTENTS = [nested, two, odd_meta, endless, hostile, no_dictionary, lambda state, rng: dict(state)]


# -- of the file itself


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 4, 60])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def without_a_member(data, rng):
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        gone = rng.choice(old.namelist())
        for name in old.namelist():
            if name != gone:
                new.writestr(name, old.read(name))
    return target.getvalue()


def with_other_ends(data, rng):
    return rng.choice(
        [data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"), b"\n" + data, data + b"\0" * 9, b"", b"PK"]
    )


FILES = [cut, flipped, without_a_member, with_other_ends]


def bad_header(data, rng):
    """A safetensors file whose header says something else than the file holds."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    change = rng.choice(["dtype", "shape", "data_offsets", "size", "json", "gone"])
    if change == "gone":
        del header[name]
    elif change not in ("size", "json"):
        odd = {"dtype": ["F64", "I8", "no", 3], "shape": [[1], [-1], "x"], "data_offsets": [[0, 1], [9, 3], [-1, 5]]}
        header[name][change] = rng.choice(odd[change])
    text = b'{"a": ' if change == "json" else json.dumps(header).encode()
    claimed = rng.choice([0, 7, len(data), 1 << 40]) if change == "size" else len(text)
    return struct.pack("<Q", claimed) + text + data[8 + size :]


def mutated(rng, path):
    """Write a file of one of the models with some changes; returns its path."""
    state = rng.choice([WHOLE, ENCODER])
    for _ in range(rng.choice([0, 1, 1, 2])):
        state = rng.choice(STATES)(state, rng)
    dense = {str(k): v.clone() for k, v in state.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    if dense and rng.random() < 0.2:
        path = path.with_suffix(".safetensors")
        path.write_bytes(rng.choice([bad_header, bad_header, cut])(save_safetensors(dense), rng))
        return path
    buffer = io.BytesIO()
    torch.save(rng.choice(CONTENTS)(state, rng), buffer)
    data = buffer.getvalue()
    path.write_bytes(rng.choice(FILES)(data, rng) if rng.random() < 0.4 else data)
    return path


def said(action, path):
    """What an action says in an error of ours, which names the file; "" where it has none."""
    try:
        action()
    except SparkFastError as error:
        return str(error) if str(path) in str(error) else f"the file is not named in: {error}"
    return ""


def assert_whole(model, path):
    """The network is one of the two that files are made of, all of it: nothing was left at its initial value."""
    found = {name.removeprefix("encoder.network."): value for name, value in model.state_dict().items()}
    numbers = {name: value for name, value in ENCODER.items() if value.is_floating_point()}
    shifts = [all(torch.allclose(found[n], v + shift, atol=0.02) for n, v in numbers.items()) for shift in (0, 1)]
    assert any(shifts), f"{path} was loaded in part, or as something else"


def fuzz(folder, seed, count):
    """Returns how many loads were refused and how many not, of two for each file."""
    rng, refused, loaded = random.Random(seed), 0, 0
    for number in range(count):
        path = mutated(rng, folder / f"{number}.pth")
        for model, load in (
            (tiny_spark(), load_into_spark),
            (TwoConvolutions(), partial(load_into_network, new=set())),
        ):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            message = said(lambda model=model, load=load, path=path: load(read_weights(path), model), path)
            assert "is not named" not in message, message
            if message:
                refused += 1
                assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), f"{path}: in part"
            else:
                loaded += 1
                assert_whole(model, path)
        path.unlink()
    assert not TOUCHED, "code of a file was run"
    return refused, loaded


def test_sixty_mutated_files_are_loaded_whole_or_refused(tmp_path, quick_lookalikes):
    refused, loaded = fuzz(tmp_path, 1, 60)
    assert min(refused, loaded) > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.drill) for seed in range(3, 6))])
def test_four_hundred_mutated_files_are_loaded_whole_or_refused(tmp_path, quick_lookalikes, seed):
    refused, loaded = fuzz(tmp_path, seed, 400)
    assert min(refused, loaded) > 50


@pytest.fixture
def quick_lookalikes(monkeypatch):
    """What a file of no network looks like takes a second a file to find out, and is tested elsewhere."""
    monkeypatch.setattr("spark_fast.weights.identify.LOOKALIKES", ("resnet10t",))
    monkeypatch.setattr("spark_fast.weights.identify.RECOGNISED", ("resnet18",))
