from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2ssl.models.import_file import read_foreign_state

GOLDEN = Path(__file__).parents[1] / "golden"
STATE = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("legacy", [False, True])
def test_the_weights_come_out_of_icefalls_checkpoints_and_the_average_if_asked_for(legacy: bool, tmp_path: Path) -> None:
    average = {key: value.double() + 1 for key, value in STATE.items()}
    content = {"model": STATE, "model_avg": average, "optimizer": {"state": {0: {"x": torch.zeros(2)}}}, "sampler": None, "epoch": 3}
    content |= {"exp_dir": pathlib.PosixPath("exp/base"), "options": argparse.Namespace(layers=(2, 2), lr=0.045)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    assert equal(read_foreign_state(tmp_path / "x.pt"), STATE)
    assert equal(read_foreign_state(tmp_path / "x.pt", "model_avg"), average)


@pytest.mark.parametrize("name", ["fairseq_like.pt", "fairseq_like_legacy.pt"])
def test_the_weights_come_out_of_a_checkpoint_that_holds_foreign_objects(name: str) -> None:
    # recorded with omegaconf's DictConfig, argparse's Namespace and an enumeration of a module that is not here
    found = read_foreign_state(GOLDEN / name)
    assert equal(found, {"mask_emb": torch.arange(4.0), "final_proj.weight": torch.ones(2, 4).half()})


def test_a_state_dictionary_by_itself_is_read_whatever_entry_is_asked_for(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.bin")
    assert equal(read_foreign_state(tmp_path / "x.bin", "model_avg"), STATE)


def test_safetensors_files_are_read_as_their_own_library_wrote_them() -> None:
    expected = {
        "a.weight": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([1.5, -2.25], dtype=torch.float16),
        "c": torch.tensor([1.5, -3.0], dtype=torch.bfloat16),
        "n": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    found = read_foreign_state(GOLDEN / "tiny.safetensors")
    assert equal(found, expected)
    assert all(found[key].dtype == value.dtype for key, value in expected.items())


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)  # posix.mkdir, of a module that torch refuses whatever stands for it


class Evaluation(Trap):
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (f"__import__('os').mkdir({str(self.folder)!r})",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trap", [Trap, Evaluation])
def test_nothing_in_a_file_is_run(trap: type[Trap], legacy: bool, tmp_path: Path) -> None:
    folder, path = tmp_path / "sprung", tmp_path / "x.pt"
    torch.save({"model": STATE, "trap": trap(folder)}, path, _use_new_zipfile_serialization=not legacy)
    if trap is Trap:
        with pytest.raises(ValueError, match=r"x\.pt: cannot be read .*posix\.mkdir.*weights alone"):
            read_foreign_state(path)
    else:
        assert equal(read_foreign_state(path), STATE)
    assert not folder.exists()
    torch.load(path, weights_only=False)  # that the trap works at all
    assert folder.exists()


UNSAFE = "weights_only=False"


@pytest.mark.parametrize(
    ("content", "protocol"),
    [
        ({"model": STATE, "trap": Trap}, 2),
        ({"model": STATE, "trap": Evaluation}, 4),  # names are not written out
        ({"model": {**STATE, "trap": Evaluation}}, 2),
        (Evaluation, 2),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_to_load_a_hostile_file_unsafely_is_never_advised(content: object, protocol: int, legacy: bool, tmp_path: Path) -> None:
    def sprung(value: object) -> object:
        if isinstance(value, dict):
            return {key: sprung(each) for key, each in value.items()}
        return value(tmp_path / "sprung") if isinstance(value, type) else value

    path = tmp_path / "x.pt"
    torch.save(sprung(content), path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"x\.pt: ") as caught:
        read_foreign_state(path)
    assert UNSAFE not in str(caught.value) and not (tmp_path / "sprung").exists()
    if protocol == 2:
        assert "which loading it would run" in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_is_cut_short_is_to_be_fetched_again(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": {"a": torch.zeros(5000)}}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.pt: cannot be read as a checkpoint: .*fetch it again") as caught:
            read_foreign_state(path)
        assert UNSAFE not in str(caught.value) and ("cut short" in str(caught.value)) == (size > 0)


def test_what_is_of_another_kind_gets_no_advice_to_load_it(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for content in (b"hello world", b"<html>", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"it begins with b'{content[:5].decode()}.*, as no file of torch\.save does") as caught:
            read_foreign_state(path)
        assert UNSAFE not in str(caught.value)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match="a TorchScript program, not a checkpoint") as caught:
        read_foreign_state(path)
    assert UNSAFE not in str(caught.value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"x\.pt: cannot be read as a checkpoint") as caught:
        read_foreign_state(path)
    assert UNSAFE not in str(caught.value)


def test_what_holds_no_weights_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(ValueError, match=r"x\.pt: no such file"):
        read_foreign_state(path)
    with pytest.raises(ValueError, match="a folder, a file is needed"):
        read_foreign_state(tmp_path)
    for content in (b"", b"some text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pt: cannot be read"):
            read_foreign_state(path)
    for wrong, message in (
        ([1], r"x\.pt: holds no dictionary"),
        ({}, r"entry 'model' holds no weights; entries that do: none"),
        ({"state_dict": STATE, "epoch": 1}, r"entry 'model' holds no weights; entries that do: state_dict"),
        ({"model": {**STATE, "n": 3}}, r"entry 'model' holds not only tensors: n \(int\).*torch\.save"),
        (argparse.Namespace(model=STATE), r"x\.pt: holds no dictionary"),
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=message):
            read_foreign_state(path)
    assert equal(read_foreign_state_of({"state_dict": STATE, "epoch": 1}, path), STATE)


def read_foreign_state_of(content: object, path: Path) -> dict[str, Tensor]:
    torch.save(content, path)
    return read_foreign_state(path, "state_dict")


def test_damaged_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    shutil.copy(GOLDEN / "tiny.safetensors", path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    shifted = whole.replace(b'"shape":[2,3]', b'"shape":[2,4]')
    unknown = whole.replace(b'"F16"', b'"F8_"')
    for content in (b"", whole[:7], whole[: 8 + header // 2], whole[:-4], b"\xff" * 100, b"\x02" + bytes(7) + b"[]", shifted, unknown):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors: not a safetensors file"):
            read_foreign_state(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}', r"shape of a tensor is \[-1, -2\], a list of whole numbers >= 0"),
        (b'{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', r"shape of a tensor is \[True, 2\], a list of whole"),
        (b'{"a":{"dtype":"F32","shape":"x","data_offsets":[0,8]}}', "shape of a tensor is 'x', a list of whole"),
        (b'{"a":{"dtype":"F32","shape":[0,1180591620717411303424],"data_offsets":[0,0]}}', ""),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_hostile_safetensors_headers_are_refused(header: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"x\.safetensors: not a safetensors file, or one cut short: .*" + message):
        read_foreign_state(path)
