"""Checkpoints of safetensors: one file, or the folder that ``save_pretrained`` writes, with its shards and its index.

A folder is read tensor by tensor and written with the same shards, index and small files beside them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from leanops.optim.zo.log import LogError
from leanops.optim.zo.safetensors_header import Stored, read_header
from leanops.optim.zo.whole_files import new_folder, replacing

_INDEX = "model.safetensors.index.json"
_SINGLE = ("model.safetensors", "adapter_model.safetensors")  # of a model, of a PEFT adapter
_WEIGHTS = {  # files beside the shards that hold other weights, or the state of a run: they are not copied
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".zolog",
}  # fmt: skip


class Checkpoint:
    """The tensors of a safetensors file, of an index, or of the folder that holds either."""

    def __init__(self, base: str | os.PathLike[str]) -> None:
        path = Path(base)
        self.name = str(base)
        self.index: Path | None = None
        self.is_folder = path.is_dir()
        if self.is_folder:
            path = _weights_of(path)
        if path.name.endswith(".json"):
            self.index, self.is_folder = path, True
        self.folder = path.parent
        weight_map = {} if self.index is None else _read_index(self.index)
        self.shards = [self.folder / n for n in dict.fromkeys(weight_map.values())] if self.index else [path]
        self.preambles: list[bytes] = []
        self.tensors: dict[str, Stored] = {}  # in the order of the shards and of the bytes in each
        for shard in self.shards:
            self._add(shard)
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].path.name != file:
                raise LogError(f"{self.index}: damaged: tensor {name} must be in {file}, which does not hold it")

    def _add(self, shard: Path) -> None:
        if self.index is not None and not shard.is_file():
            raise FileNotFoundError(f"{self.index}: shard {shard.name} is missing")
        preamble, table = read_header(shard)
        self.preambles.append(preamble)
        for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            if name in self.tensors:
                raise LogError(f"{self.name}: tensor {name} is in {self.tensors[name].path.name} and in {shard.name}")
            first, last = entry["data_offsets"]
            start = len(preamble) + first
            self.tensors[name] = Stored(shard, start, last - first, entry["dtype"], tuple(entry["shape"]))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def small_files(self) -> list[Path]:
        """The files beside the weights, such as the configuration and the tokenizer. Subfolders are left out."""
        found = sorted(p for p in self.folder.iterdir() if p.is_file())
        return [p for p in found if p.suffix not in _WEIGHTS and not p.name.endswith(".index.json")]

    @contextmanager
    def rewritten(self, out: str | os.PathLike[str]) -> Iterator[Transfer]:
        """The checkpoint open to be read, and ``out`` to be written: its headers are there, its tensors are not.
        ``out`` appears when the block ends, or not at all."""
        with ExitStack() as stack:
            if self.is_folder:
                folder = stack.enter_context(new_folder(out))
                files: list[BinaryIO] = [stack.enter_context(open(folder / s.name, "wb")) for s in self.shards]
            else:
                files = [stack.enter_context(replacing(out))]
            for file, preamble in zip(files, self.preambles, strict=True):
                file.write(preamble)
            readers = [stack.enter_context(open(shard, "rb")) for shard in self.shards]
            pairs = zip(readers, files, strict=True)
            yield Transfer(dict(zip(self.shards, pairs, strict=True)))
            if self.is_folder:
                for file in files:
                    file.flush()
                # last, so that the unfinished folder that a killed run leaves does not load
                for path in [*self.small_files(), *([self.index] if self.index else [])]:
                    shutil.copyfile(path, folder / path.name)


class Transfer:
    """Reads the bytes of a checkpoint's tensors, and writes those of the new checkpoint, in any order."""

    def __init__(self, files: Mapping[Path, tuple[BufferedReader, BinaryIO]]) -> None:
        self._files = files

    def read(self, tensor: Stored, first: int = 0, count: int | None = None) -> bytearray:
        """``count`` bytes of a tensor, all by default."""
        reader = self._files[tensor.path][0]
        reader.seek(tensor.start + first)
        wanted = tensor.nbytes - first if count is None else count
        data = bytearray(wanted)
        if reader.readinto(data) != wanted:
            raise LogError(f"{tensor.path}: truncated while it was read")
        return data

    def write(self, tensor: Stored, data: bytes | bytearray | memoryview, first: int = 0) -> None:
        writer = self._files[tensor.path][1]
        writer.seek(tensor.start + first)
        writer.write(data)


def _weights_of(folder: Path) -> Path:
    """The file or the index of a folder's weights, as transformers and PEFT call it, else the only one of its kind."""
    for name in (_SINGLE[0], _INDEX, _SINGLE[1]):
        if (folder / name).is_file():
            return folder / name
    indices = sorted(folder.glob("*.safetensors.index.json"))
    found = indices or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        got = ", ".join(p.name for p in found[:8]) or "neither"
        raise FileNotFoundError(f"{folder}: a folder must hold {_INDEX} or one safetensors file, got {got}")
    return found[0]


def _read_index(path: Path) -> dict[str, str]:
    """A tensor's name -> the file that holds it, a name within the folder of the index."""
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LogError(f"{path}: not an index of safetensors: it does not read ({error})") from error
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise LogError(f"{path}: not an index of safetensors: it must hold a weight_map")
    for name, file in found.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise LogError(f"{path}: the shard of {name} must be a safetensors file beside the index, got {file!r}")
    return found
