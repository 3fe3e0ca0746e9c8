"""The replay of folders: the shards, index and small files of the base, and nothing where something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from zo.runs import VARIANTS, run

from leanops.bench import cli
from leanops.optim import LogError, MeZO, replay_, replay_file
from leanops.optim.zo import checkpoint as checkpoint_module
from leanops.optim.zo import replay_file as replay_file_module

INDEX = "model.safetensors.index.json"
LAST = "model-00003-of-00003.safetensors"


def save_sharded(model: nn.Module, folder: Path, shards: int = 3) -> None:
    """A model as save_pretrained writes one that does not fit one file."""
    folder.mkdir()
    names = {f"model-{i + 1:05}-of-{shards:05}.safetensors": [] for i in range(shards)}  # type: ignore[var-annotated]
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    for i, name in enumerate(tensors):
        names[list(names)[i % shards]].append(name)
    for file, own in names.items():
        save_file({n: tensors[n] for n in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, own in names.items() for n in own}}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def equals(folder: Path, model: nn.Module) -> bool:
    tensors = loaded(folder)
    return all(torch.equal(tensors[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("options", [VARIANTS[n] for n in ("plain", "momentum", "low rank", "hizoo")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["folder", "index"])
def test_a_folder_gives_a_folder_with_the_bits_of_the_run(
    base: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_file_module, "_SLICE", 2)
    start, end, opt = run(dtype, **options)
    folder, out = tmp_path / "base", tmp_path / "out"
    save_sharded(start, folder)
    for name in ("tokenizer.json", "special_tokens_map.json", "merges.txt", "tokenizer.model", "chat_template.jinja"):
        (folder / name).write_text(name)
    for name in ("optimizer.pt", "training_args.bin", "pytorch_model.bin", "other.safetensors", "run.zolog"):
        (folder / name).write_bytes(b"weights or state of a run")
    (folder / "onnx").mkdir()
    seen: list[tuple[int, int]] = []
    given = folder if base == "folder" else folder / INDEX
    replay_file(given, opt.log, out, progress=lambda done, total: seen.append((done, total)))
    assert equals(out, end)
    assert seen[-1][0] == seen[-1][1] == sum(p.nbytes for p in end.parameters())
    skipped = {"optimizer.pt", "training_args.bin", "pytorch_model.bin", "other.safetensors", "run.zolog", "onnx"}
    assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()} - skipped
    for path in out.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as new, safe_open(folder / path.name, "pt") as old:
                assert (new.metadata(), list(new.keys())) == (old.metadata(), list(old.keys()))
        else:
            assert path.read_bytes() == (folder / path.name).read_bytes()
    assert out.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("stop", [0, 4, 11])
def test_stop_gives_the_weights_of_an_earlier_step(stop: int, tmp_path: Path) -> None:
    start, _, opt = run(torch.float32)
    save_sharded(start, tmp_path / "base")
    opt.log.save(tmp_path / "run.zolog")
    words = [str(tmp_path / "base"), str(tmp_path / "run.zolog"), "-o", str(tmp_path / "out"), "--stop", str(stop)]
    assert cli.main(["replay", *words]) == 0
    replay_(start, opt.log, stop=stop)
    assert equals(tmp_path / "out", start)


def test_a_folder_with_one_file_and_one_with_an_adapter(tmp_path: Path) -> None:
    start, end, opt = run(torch.float32)
    for name in ("model.safetensors", "adapter_model.safetensors", "diffusion.safetensors"):
        base, out = tmp_path / f"base {name}", tmp_path / f"out {name}"
        base.mkdir()
        save_file({n: p.detach() for n, p in start.named_parameters()}, base / name)
        (base / "adapter_config.json").write_text("{}")
        replay_file(base, opt.log, out)
        assert sorted(p.name for p in out.iterdir()) == sorted(["adapter_config.json", name])
        assert equals(out, end)


def one_line_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["replay", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_names_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    start, end, opt = run(torch.float32)
    opt.log.save("run.zolog")
    save_file({f"net/{n}": p.detach() for n, p in start.named_parameters()}, "base.safetensors")
    names = {n: f"net/{n}" for n, _ in start.named_parameters()}
    Path("names.json").write_text(json.dumps(names | {"0.bias": "typo"}))
    words = ["base.safetensors", "run.zolog", "-o", "out.safetensors"]
    error = one_line_error(words, capsys)
    assert (
        "moves parameter 0.weight, which is not in the file (no config.json lies beside it; 3 more are missing)"
        in error
    )
    assert "--name LOG=BASE, --names FILE.json" in error
    assert "replay_ on the model in memory" in error
    assert "names gives typo for 0.bias, which is not" in one_line_error([*words, "--names", "names.json"], capsys)
    for text, message in (("[1]", "--names must hold an object of names"), ("{", "--names must be a file of JSON")):
        Path("wrong.json").write_text(text)
        assert message in one_line_error([*words, "--names", "wrong.json"], capsys)
    assert "missing.json" in one_line_error([*words, "--names", "missing.json"], capsys)
    assert "argument --stop: must be a number of steps, 0 or more, got -1" in one_line_error(
        [*words, "--stop=-1"], capsys
    )
    assert "got the folder .; BASE comes first" in one_line_error(["run.zolog", ".", "-o", "out"], capsys)
    assert "within [0, 11], got 0 and 12" in one_line_error([*words, "--stop", "12"], capsys)
    assert not Path("out.safetensors").exists()
    assert cli.main(["replay", *words, "--names", "names.json", "--name", "0.bias=net/0.bias"]) == 0
    got = load_file("out.safetensors")
    assert all(torch.equal(got[f"net/{n}"], p) for n, p in end.named_parameters())


def drop(folder: Path) -> None:
    next(folder.glob("*2-of*")).unlink()


def edit(change: Any) -> Any:
    def on(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return on


def doubled(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(shards[0]), **load_file(shards[1])}, shards[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"index\.json: shard model-00002-of-00003\.safetensors is missing"),
        (edit(lambda i: i.pop("weight_map")), "must hold a weight_map"),
        (edit(lambda i: i["weight_map"].update({"0.bias": LAST})), r"damaged: tensor 0\.bias must be in model-00003"),
        (edit(lambda i: i["weight_map"].update(x=LAST)), "damaged: tensor x must be in"),
        (edit(lambda i: i["weight_map"].update(x="../x.safetensors")), r"beside the index, got '\.\./x\.safetensors'"),
        (edit(lambda i: i["weight_map"].update(x=3)), "beside the index, got 3"),
        (lambda f: (f / INDEX).write_text("{"), "index of safetensors: it does not read"),
        (lambda f: (f / INDEX).unlink(), r"must hold model\.safetensors\.index\.json or one .* file, got model-"),
        (doubled, r"is in model-00001-of-00003\.safetensors and in model-00002-of-00003"),
        (lambda f: [p.unlink() for p in f.iterdir()], "or one safetensors file, got neither"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    start, _, opt = run(torch.float32)
    save_sharded(start, tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises((LogError, FileNotFoundError), match=message):
        replay_file(tmp_path / "base", opt.log, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    start, _, opt = run(torch.float32)
    base, link = tmp_path / "base", tmp_path / "link"
    save_sharded(start, base)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    link.symlink_to(tmp_path / "nowhere")
    before = {p: p.read_bytes() for p in base.iterdir()}
    read: list[int] = []
    for out in (base, tmp_path / "empty", tmp_path / "file", link, f"{base}/", ""):
        with pytest.raises(FileExistsError, match="out must be a folder that does not exist yet, got"):
            replay_file(base, opt.log, out, lambda done, total: read.append(done))
    assert not read
    with pytest.raises(FileNotFoundError, match=r"out must lie in a folder that exists, got .*missing/out"):
        replay_file(base, opt.log, tmp_path / "missing" / "out")
    assert {p: p.read_bytes() for p in base.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "empty", "file", "link"]


def test_an_error_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, _, opt = run(torch.float32)
    save_sharded(start, tmp_path / "base")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.Transfer, "write", full)
    with pytest.raises(OSError, match="No space"):
        replay_file(tmp_path / "base", opt.log, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


KILLED = """
import os, signal, sys
from leanops.optim import replay_file
def progress(done, total):
    if done * 2 > total:
        os.kill(os.getpid(), signal.SIGKILL)
replay_file(*sys.argv[1:], progress=progress)
"""


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    start, _, opt = run(torch.float32)
    save_sharded(start, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{}")
    opt.log.save(tmp_path / "run.zolog")
    words = [str(tmp_path / n) for n in ("base", "run.zolog", "out")]
    assert subprocess.run([sys.executable, "-c", KILLED, *words], check=False).returncode == -signal.SIGKILL
    (left,) = (p for p in tmp_path.iterdir() if p.name not in ("base", "run.zolog"))
    assert left.name.startswith(".out.")
    assert not {INDEX, "config.json"} & {p.name for p in left.iterdir()}
    replay_file(*words)
    assert (tmp_path / "out" / INDEX).exists()


MEMORY = """
import resource, sys
from leanops.optim import replay_file
small, big, limit = sys.argv[1:]
replay_file(f"{small}/base", f"{small}/run.zolog", f"{small}/out")  # loads the code
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
replay_file(f"{big}/base", f"{big}/run.zolog", f"{big}/out")
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
assert grown < int(limit), f"{grown} bytes more"
"""


def test_the_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    """Two shards of six tensors of 16 MB each."""
    for name, columns in (("small", 2), ("big", 1 << 20)):
        model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.zeros(4, columns)) for i in range(12)})
        (tmp_path / name).mkdir()
        save_sharded(model, tmp_path / name / "base", shards=2)
        opt = MeZO(model.parameters(), lr=1e-2, model=model, log_file=tmp_path / name / "run.zolog")
        opt.step(lambda model=model: sum(w.sum() for w in model.values()))
        opt.log.close()
    words = [str(tmp_path / "small"), str(tmp_path / "big"), str(64 << 20)]
    subprocess.run([sys.executable, "-c", MEMORY, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert equals(tmp_path / "big" / "out", model)
