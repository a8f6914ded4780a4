"""A hostile file is refused by name before it costs memory; a damaged one before it is loaded."""

import zipfile

import pytest
import torch

from spark_fast.checkpoint.validate_file import (
    DIRECTORY_LIMIT,
    RefusedError,
    check_safetensors,
    check_sha256,
    check_zip,
    sidecar,
)


@pytest.fixture
def honest(tmp_path):
    path = tmp_path / "honest.pth"
    torch.save({"a": torch.arange(1000.0), "b": torch.zeros(3)}, path)
    return path


def test_what_torch_writes_is_accepted(honest):
    check_zip(honest, crc=True)


def test_the_checksum_of_a_link_lies_beside_its_target(honest, tmp_path):
    link = tmp_path / "deeper" / "last.pth"
    link.parent.mkdir()
    link.symlink_to(honest)
    assert sidecar(link) == sidecar(honest) == tmp_path / "honest.pth.sha256"
    assert check_sha256(link) is False


@pytest.mark.parametrize("content", [b"", b"no sum", b"0" * 64 + b"  honest.pth\n", b"\xff" * 80])
def test_another_checksum_or_none_that_can_be_read_is_damage(honest, content):
    sidecar(honest).write_bytes(content)
    with pytest.raises(RefusedError, match=r"its SHA-256 differs from the one in honest\.pth\.sha256"):
        check_sha256(honest)


def rewritten(source, target, kind=zipfile.ZIP_STORED, **changed):
    """The same zip with other contents for some of its records."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for record in old.infolist():
            new.writestr(record.filename, changed.get(record.filename.rsplit("/")[-1], old.read(record)))
    return target


def test_compressed_records_are_refused(honest, tmp_path):
    with pytest.raises(RefusedError, match="its records are compressed"):
        check_zip(rewritten(honest, tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED), crc=True)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_archive_is_named_as_one_with_the_way_to_its_weights(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(RefusedError, match=r"is a TorchScript archive, .*torch\.jit\.load\(FILE\)\.state_dict\(\)"):
        check_zip(tmp_path / "a.pt", crc=True)


def test_records_that_overlap_are_refused(honest):
    content = bytearray(honest.read_bytes())
    entries = [i for i in range(len(content)) if content.startswith(b"PK\1\2", i)]
    for entry in entries:  # every record claims to be 4000 bytes, as the largest is
        content[entry + 20 : entry + 28] = (4000).to_bytes(4, "little") * 2
    honest.write_bytes(content)
    with pytest.raises(RefusedError, match="overlap or claim more"):
        check_zip(honest, crc=False)


def test_a_pickle_beyond_all_measure_is_refused(honest, tmp_path):
    path = rewritten(honest, tmp_path / "pickle.pth", **{"data.pkl": b"]" * (3 << 20)})
    with pytest.raises(RefusedError, match=r"data\.pkl has 3145728 bytes"):
        check_zip(path, crc=True)


def test_a_directory_beyond_all_measure_is_refused_unread(tmp_path):
    length = DIRECTORY_LIMIT + 1
    end = b"PK\5\6" + bytes(8) + length.to_bytes(4, "little") + bytes(6)
    (tmp_path / "wide.pth").write_bytes(bytes(length) + end)
    with pytest.raises(RefusedError, match=f"its zip directory has {length} bytes"):
        check_zip(tmp_path / "wide.pth", crc=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "it claims a header of 0 bytes and has 0 in all"),
     (b"short", "and has 5 in all"),
     ((1 << 50).to_bytes(8, "little") + b"{}", f"it claims a header of {1 << 50} bytes and has 10 in all"),
     ((5 << 20).to_bytes(8, "little") + bytes(5 << 20), f"was not loaded: its safetensors header has {5 << 20} bytes")],
    ids=["empty", "short", "claimed", "long"],
)  # fmt: skip
def test_a_safetensors_header_out_of_measure_is_refused(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(RefusedError, match=message):
        check_safetensors(path)
