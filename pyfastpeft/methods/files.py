"""Files of adapters: JSON and safetensors, written whole or not at all, and never a pickle."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..ops.checks import distributed, need, need_value

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("adapters are stored as safetensors files: pip install safetensors") from None
    return safetensors


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of these tensors, which may lie on any device and may share memory."""
    packed, seen = {}, set()
    for key, tensor in tensors.items():
        need_value(tensor.device.type != "meta", "save", key, tensor, "a tensor that has values")
        given = f"a DTensor of shape {list(tensor.shape)}, of which this process may hold a part"
        needed = "whole, as after unshard() of all modules that FSDP shards"
        need(not distributed(tensor), "save", key, given, needed, TypeError)
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:  # tied tensors are stored for each name
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        packed[key] = plain
    return _safetensors().torch.save(packed, metadata={"format": "pt"})


def json_as_bytes(content: dict) -> bytes:
    """JSON as PEFT writes it: indented by two, keys sorted."""
    return json.dumps(content, indent=2, sort_keys=True).encode()


def write_files(directory: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Write these files, all or none: where that fails, those of before stay whole. The directory is made if need be.

    Each is written beside its place, brought to the disk and then renamed.
    """
    directory = _path("save", directory)
    need(not directory.is_file(), "save", "directory", f"{str(directory)!r}, a file", "a directory", NotADirectoryError)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as scratch:
        for name, content in files.items():
            with open(Path(scratch, name), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        present = [name for name in files if (directory / name).exists()]
        for name in present:
            _link(directory / name, Path(scratch, f"{name}.before"))
        try:
            for name in files:
                os.replace(Path(scratch, name), directory / name)
        except BaseException:
            for name in files:
                if name in present:
                    os.replace(Path(scratch, f"{name}.before"), directory / name)
                else:
                    (directory / name).unlink(missing_ok=True)
            raise
        _flush(directory)


def _path(op, directory) -> Path:
    need_value(isinstance(directory, (str, os.PathLike)), op, "directory", directory, "a path", TypeError)
    return Path(directory)


def _link(path, other):
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        shutil.copy2(path, other)


def _flush(directory):
    if os.name != "posix":  # elsewhere directories cannot be opened
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def need_file(directory: str | os.PathLike, name: str) -> Path:
    """The path of a file in `directory`. Raises NotADirectoryError or FileNotFoundError, telling what is there."""
    directory = _path("load", directory)
    needed = f"a directory with {name}"
    need(directory.is_dir(), "load", "directory", f"{str(directory)!r}, which is none", needed, NotADirectoryError)
    if (directory / name).is_file():
        return directory / name
    present = sorted(path.name for path in directory.iterdir())
    given = f"{str(directory)!r}, which holds {', '.join(present[:10]) or 'nothing'}"
    if pickles := [other for other in present if other.endswith(PICKLES)]:
        needed += f"; {pickles[0]} is not read, since a pickle can run any code: convert it where it came from"
    need(False, "load", "directory", given, needed, FileNotFoundError)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError, naming the file, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as why:
        raise ValueError(f"{path} is no JSON: {why}") from None
    need_value(isinstance(content, dict), "load", str(path), content, "a JSON object")
    return content


@contextmanager
def opened(path: Path) -> Iterator:
    """A safetensors file, its tensors read as they are asked for. Raises ValueError for a file that is none, or that is
    truncated."""
    safetensors = _safetensors()
    try:
        file = safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as why:
        raise ValueError(f"{path} is no whole safetensors file: {why}") from None
    with file:
        yield file
