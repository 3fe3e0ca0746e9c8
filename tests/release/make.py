"""Makes the fixtures of a release, by which tests of later releases know that no bit has changed.

    PYTHONPATH=tests .venv/bin/python -m release.make

writes ``tests/release/<version>/`` with the installed leanops: logs, saved states and weights in ``fixtures.tar.xz``,
and in ``manifest.json`` how they were made. It refuses to overwrite: fixtures of a release are made once, from its own
code, and ``test_release.py`` reads those of all releases.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from release import operators, runs
from release.bits import digest, leaves, state_digests
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import leanops
from leanops.optim import MeZO, SeedPool, TensorSelector

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16", "float16")

# --- what is made ---------------------------------------------------------------------------------------------------


def _run(names: str, half: tuple[str, int] | None, lr: float = 0.05, **options: Any) -> dict[str, Any]:
    """A run of MeZO in every dtype; in one of them, its state is saved before a step."""
    named = {"lr": lr, "eps": 0.01, "momentum": 0.0, "directions": 1, "distribution": "gaussian", "rounding": "nearest"}
    options = {**named, "variant": "spsa", "momentum_mode": "recompute", "smoothing": 0.01, **options}
    saved = None if half is None else {"dtype": half[0], "step": half[1]}
    dtypes = DTYPES if saved is None else (*DTYPES, "float64")
    return {"names": names, "dtypes": dtypes, "half": saved, "options": options}


_STOCHASTIC = {"rounding": "stochastic"}
_MOMENTUM = {"momentum": 0.6}
_STORED = {"momentum": 0.6, "momentum_mode": "store"}
_RADEMACHER = {"distribution": "rademacher"}


def _low_rank(rank: int, period: int) -> dict[str, Any]:
    return {"distribution": "lowrank", "rank": rank, "period": period}


MEZO: dict[str, dict[str, Any]] = {
    "spsa": _run("pairs", ("float32", 4), seed=1),
    "momentum": _run("model", ("bfloat16", 8), seed=-3, **_MOMENTUM),
    "stored": _run("none", ("float16", 9), seed=2**63, **_STORED),
    "directions": _run("model", ("float16", 8), seed=4, directions=3, **_STOCHASTIC, **_MOMENTUM),
    "spsa_rademacher": _run("none", ("bfloat16", 7), seed=5, directions=2, **_STOCHASTIC, **_STORED, **_RADEMACHER),
    "one_sided": _run("model", None, seed=6, variant="one_sided", directions=2, **_STOCHASTIC),
    "one_sided_rademacher": _run("pairs", None, seed=7, variant="one_sided", **_MOMENTUM, **_RADEMACHER),
    "one_sided_lowrank": _run("none", None, seed=8, variant="one_sided", directions=2, **_low_rank(2, 3)),
    "sign": _run("pairs", ("bfloat16", 6), 0.01, seed=9, variant="sign", **_STOCHASTIC),
    "sign_rademacher": _run("model", None, 0.01, seed=10, variant="sign", **_MOMENTUM, **_RADEMACHER),
    "sign_lowrank": _run("none", None, 0.01, seed=11, variant="sign", **_low_rank(5, 50)),
    "fzoo": _run("model", ("float32", 7), 0.01, seed=12, variant="fzoo", directions=4, **_STOCHASTIC, **_RADEMACHER),
    "fzoo_gaussian": _run("none", None, 0.01, seed=13, variant="fzoo", directions=3, **_MOMENTUM),
    "fzoo_lowrank": _run("pairs", None, 0.01, seed=14, variant="fzoo", directions=2, **_low_rank(1, 4)),
    "hizoo": _run("model", ("bfloat16", 7), seed=15, variant="hizoo"),
    "hizoo_stored": _run("none", ("float16", 9), seed=16, variant="hizoo", directions=2, **_STOCHASTIC, **_STORED),
    "lowrank": _run("model", ("float32", 7), seed=17, **_low_rank(2, 3)),
    "lowrank_momentum": _run("pairs", None, seed=18, directions=2, **_STOCHASTIC, **_MOMENTUM, **_low_rank(3, 4)),
    "lowrank_stored": _run("model", ("bfloat16", 9), seed=2**64 - 19, **_STORED, **_low_rank(1, 1)),
}
WRAPPED = {"compiled": "float32", "parallel": "bfloat16", "compiled_parallel": "float16", "inside": "bfloat16"}
UNCLOSED, LONG = 9, 4100

_SM3 = {"lr": 0.1, "momentum": 0.9, "beta": 1.0, "eps": 1e-30, "weight_decay": 0.1, "decoupled": True, "seed": 3}
_ALL = list(runs.SM3_SHAPES)


def _sm3(dtype: str, **options: Any) -> dict[str, Any]:
    return {"fused": False, "groups": [{"names": _ALL, "dtype": dtype, "options": {**_SM3, **options}}]}


SM3: dict[str, dict[str, Any]] = {
    "none": _sm3("float32", momentum=0.0),
    "none_stochastic": _sm3("bfloat16", momentum=0.0, beta=0.9, stochastic_rounding=True, seed=-1),
    "float32": _sm3("float32", decoupled=False),
    "float32_stochastic": _sm3("bfloat16", stochastic_rounding=True, seed=2**64 - 7),
    "bfloat16": _sm3("float16", momentum_dtype="bfloat16", decoupled=False, eps=1e-6),
    "int8": _sm3("float32", momentum_dtype="int8"),
    "int8_stochastic": _sm3("bfloat16", momentum_dtype="int8", beta=0.95, stochastic_rounding=True),
    "int8_coupled": _sm3("float16", momentum_dtype="int8", decoupled=False, stochastic_rounding=True, maximize=True),
    "groups": {
        "fused": False,
        "groups": [
            {"names": ["wide", "scalar"], "dtype": "float64", "options": {**_SM3, "momentum": 0.0, "beta": 0.5}},
            {"names": ["conv", "vector"], "dtype": "float16", "options": {**_SM3, "tensor_lr": True, "seed": 5}},
        ],
    },
    "in_backward": {**_sm3("bfloat16", momentum_dtype="bfloat16", stochastic_rounding=True), "fused": True},
}
POOLS: dict[str, dict[str, Any]] = {
    "pairs": {"size": 64, "seed": -9, "distribution": "gaussian", "rounding": "nearest", "clip": 2.0},
    "many_candidates": {"size": 70000, "seed": 10, "distribution": "rademacher", "rounding": "stochastic"},
    "sums": {"size": 40, "seed": 2**63 + 1, "distribution": "rademacher", "rounding": "nearest"},
    "full": {"size": 50, "seed": 12, "distribution": "gaussian", "rounding": "stochastic"},
}

# --- how ------------------------------------------------------------------------------------------------------------


def write(path: Path, content: Any) -> None:
    """Bytes, weights, or a state as torch saves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file({n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in content.items()}, path)
    else:
        torch.save(content, path)


def copied(weights: dict[str, Any]) -> runs.Weights:
    return {n: w.detach().clone() for n, w in weights.items()}


def make_mezo(folder: Path) -> dict[str, Any]:
    found = {}
    for name, run in MEZO.items():
        states = {}
        for dtype in run["dtypes"]:
            model = runs.tiny(runs.start(getattr(torch, dtype)))
            opt = runs.mezo(model, run)
            half = run["half"]["step"] if run["half"] and run["half"]["dtype"] == dtype else 0
            runs.take(opt, model, range(half))
            if half:
                state = {"weights": copied(runs.parameters(model)), "optimizer": opt.state_dict()}
                write(folder / name / f"{dtype}.half.pt", state)
            runs.take(opt, model, range(half, runs.STEPS))
            if half:
                states = state_digests(opt.state_dict())
            write(folder / name / f"{dtype}.zolog", opt.log.to_bytes())
            write(folder / name / f"{dtype}.safetensors", runs.parameters(model))
        found[name] = {**run, "states": states}
    return found


def wrapped(kind: str, model: runs.Tiny) -> nn.Module:
    if kind == "inside":
        model.conv = torch.compile(model.conv, backend="eager")  # type: ignore[assignment]
        model.proj = checkpoint_wrapper(model.proj)  # type: ignore[assignment]
        return model
    outer: Any = model
    if "parallel" in kind:
        outer = nn.DataParallel(outer)
    return torch.compile(outer, backend="eager") if "compiled" in kind else outer


def make_wrapped(folder: Path) -> dict[str, Any]:
    """Runs whose log has the names that wrappers of the model give to its parameters."""
    found = {}
    for kind, dtype in WRAPPED.items():
        model = wrapped(kind, runs.tiny(runs.start(getattr(torch, dtype))))
        opt = runs.mezo(model, _run("model", None, seed=20))
        runs.take(opt, model, range(7))
        write(folder / f"{kind}.zolog", opt.log.to_bytes())
        write(folder / f"{kind}.safetensors", runs.parameters(model))
        found[kind] = {"dtype": dtype, "names": [e["name"] for e in opt.log.params()]}
    return found


def make_odd_logs(folder: Path) -> dict[str, Any]:
    """The log of a run that was killed while it wrote, and one with checksums between its steps."""
    model = runs.tiny(runs.start(torch.bfloat16))
    path = folder / "unclosed.zolog"
    folder.mkdir()
    opt = runs.mezo(model, _run("pairs", None, seed=21, **_MOMENTUM), log_file=path)
    runs.take(opt, model, range(UNCLOSED))
    data = path.read_bytes()
    opt.log.close()
    write(path, data + b"\x01\x02\x03")
    write(folder / "unclosed.safetensors", runs.parameters(model))

    p = nn.Parameter(runs.long_start())
    opt = MeZO([("w", p)], lr=1e-3, eps=0.01, seed=22, rounding="stochastic", weight_decay=0.01)
    for _ in range(LONG):
        opt.step(lambda: runs.long_loss(p))
    write(folder / "long.zolog", opt.log.to_bytes())
    write(folder / "long.safetensors", {"w": p})
    return {"unclosed": UNCLOSED, "long": LONG}


def make_pools(folder: Path) -> dict[str, Any]:
    found = {}
    for name, options in POOLS.items():
        pool = SeedPool(**options)
        if name in ("sums", "full"):
            for i, weight in enumerate((0.25, 0.75)):
                client = SeedPool(**options)
                runs.fill(client, 12, 40 + i)
                pool.merge(client, weight)
        else:
            runs.fill(pool, 30, 7)
        data = pool.to_bytes(history=name != "sums")
        write(folder / f"{name}.zopool", data)
        pool = SeedPool.from_bytes(data)
        applied = {}
        for dtype in DTYPES:
            model = runs.tiny(runs.start(getattr(torch, dtype)))
            pool.apply_(model, runs.POOL_LR)
            applied[dtype] = digest(leaves(runs.parameters(model)))
        found[name] = {"applied": applied, "history": digest(runs.history(pool))}
        if name == "pairs":
            model = runs.tiny(runs.start(torch.bfloat16))
            runs.pool_steps(pool, model, runs.CANDIDATES)
            stepped = digest(leaves(runs.parameters(model)))
            found[name] |= {"stepped": stepped, "bytes": hashlib.sha256(pool.to_bytes()).hexdigest()}
    return found


def make_sm3(folder: Path) -> dict[str, Any]:
    found = {}
    for name, run in SM3.items():
        params, opt = runs.sm3(runs.sm3_start(run), run)
        half = runs.SM3_STEPS // 2
        runs.sm3_take(params, opt, range(half))
        write(folder / f"{name}.half.pt", {"weights": copied(params), "optimizer": opt.state_dict()})
        runs.sm3_take(params, opt, range(half, runs.SM3_STEPS))
        write(folder / f"{name}.safetensors", params)
        found[name] = {**run, "half": half, "states": state_digests(opt.state_dict())}
    return found


def make_selections(folder: Path) -> dict[str, Any]:
    found = {}
    for name in runs.SELECTIONS:
        model, selection = runs.selection(name)
        half = 5
        if isinstance(selection, TensorSelector):
            selected = selection.select(lambda model=model: model())
            write(folder / f"{name}.pt", selection.state_dict())
            later = [selection.select(importance=i).names for i in runs.importances(selection)]
            found[name] = {"trainable": sorted(selected.names), "later": later}
            continue
        runs.draws(selection, range(half))
        write(folder / f"{name}.pt", selection.state_dict())
        found[name] = {"half": half, "draws": runs.draws(selection, range(half, runs.SELECTION_STEPS))}
    return found


def commit() -> str:
    """The last commit that changed the code. The working tree must be that code."""
    code = ["csrc", "pyops", "optim"]
    if changed := git("status", "--porcelain", "--", *code):
        sys.exit(f"release.make: the code must be a release's, got changes that are not committed:\n{changed}")
    return git("log", "-1", "--format=%H", "--", *code)


def packed(folder: Path) -> bytes:
    """The folder's files as an archive without times and owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=9) as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    return buffer.getvalue()


def lines(made: dict[str, Any]) -> str:
    """JSON with a line an entry, and one for each entry of those that hold several."""
    parts = []
    for key, value in made.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            text = f"{{\n{inner}\n }}"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    folder = HERE / leanops.__version__
    if folder.exists():
        sys.exit(f"release.make: {folder} is there already; fixtures of a release are made once")
    made: dict[str, Any] = {
        "version": leanops.__version__,
        "commit": commit(),
        "command": "PYTHONPATH=tests .venv/bin/python -m release.make",
        "with": {"python": platform.python_version(), "torch": torch.__version__},
    }
    with tempfile.TemporaryDirectory() as name:
        files = Path(name)
        for dtype in (*DTYPES, "float64"):
            write(files / "start" / f"{dtype}.safetensors", runs.start(getattr(torch, dtype)))
        made["mezo"] = make_mezo(files / "mezo")
        made["wrapped"] = make_wrapped(files / "wrapped")
        made["odd_logs"] = make_odd_logs(files / "odd_logs")
        made["pools"] = make_pools(files / "pools")
        made["sm3"] = make_sm3(files / "sm3")
        made["selections"] = make_selections(files / "selections")
        made["operators"] = operators.digests(CPU)
        archive = packed(files)
    made["fixtures.tar.xz"] = hashlib.sha256(archive).hexdigest()
    folder.mkdir()
    (folder / "fixtures.tar.xz").write_bytes(archive)
    (folder / "manifest.json").write_text(lines(made))
    print(f"{folder}: {sum(p.stat().st_size for p in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
