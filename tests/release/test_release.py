"""No bit changes between releases: files of an earlier release load today, and lead to the same weights.

Each folder beside this file holds the fixtures of one release; ``make.py`` makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from release import make, operators, runs
from release.bits import differing, digest, leaves, state_digests
from safetensors.torch import load_file

from leanops.optim import SeedPool, ZoLog, replay_, replay_file

HERE = Path(__file__).parent
MADE = {path.parent.name: json.loads(path.read_text()) for path in sorted(HERE.glob("*/manifest.json"))}
RUNS = [(v, name, dtype) for v, made in MADE.items() for name, run in made["mezo"].items() for dtype in run["dtypes"]]
RESUMED = [(v, name) for v, made in MADE.items() for name, run in made["mezo"].items() if run["half"]]


def of_each(family: str) -> pytest.MarkDecorator:
    """One test for every entry of a manifest's family."""
    return pytest.mark.parametrize(
        ("version", "name"), [(v, name) for v, made in MADE.items() for name in made[family]]
    )


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each release's fixtures, unpacked."""
    found = {}
    for version in MADE:
        found[version] = tmp_path_factory.mktemp(version)
        with tarfile.open(HERE / version / "fixtures.tar.xz") as tar:
            for entry in tar:
                path = found[version] / entry.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(entry).read())
    return found


def weights(path: Path, device: torch.device) -> runs.Weights:
    return load_file(path, device=str(device))


def start(folder: Path, dtype: str, device: torch.device) -> runs.Weights:
    return weights(folder / "start" / f"{dtype}.safetensors", device)


# --- the fixtures themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", MADE)
def test_the_fixtures_are_those_that_the_release_made(version):
    made = MADE[version]
    assert made["version"] == version
    archive = (HERE / version / "fixtures.tar.xz").read_bytes()
    assert hashlib.sha256(archive).hexdigest() == made["fixtures.tar.xz"]


def test_fixtures_are_not_made_twice(monkeypatch):
    monkeypatch.setattr("leanops.__version__", next(iter(MADE)))
    with pytest.raises(SystemExit, match="is there already"):
        make.main()


def test_one_changed_bit_is_seen():
    a = runs.start(torch.bfloat16)
    b = runs.start(torch.bfloat16)
    assert differing(a, b) == []
    b["conv.bias"].view(torch.int16)[3] ^= 1
    assert differing(a, b) == ["conv.bias"]
    assert digest(list(a.values())) != digest(list(b.values()))
    assert differing({"z": torch.tensor(0.0)}, {"z": torch.tensor(-0.0)}) == ["z"]
    assert differing({"z": torch.tensor(0.0)}, {}) == ["z"]


# --- logs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "name", "dtype"), RUNS)
def test_a_log_replays_to_the_weights_of_its_run(folders, version, name, dtype, device):
    folder = folders[version]
    run = MADE[version]["mezo"][name]
    log = ZoLog.load(folder / "mezo" / name / f"{dtype}.zolog")
    model = runs.tiny(start(folder, dtype, device))
    found = runs.parameters(model)
    if run["names"] == "none":
        replay_([found[n] for n in runs.LOG_ORDER], log)
    else:
        assert [e["name"] for e in log.params()] == runs.LOG_ORDER
        replay_(model, log)
    end = weights(folder / "mezo" / name / f"{dtype}.safetensors", device)
    assert differing(found, end) == []
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(("version", "name", "dtype"), RUNS)
def test_a_log_replays_from_file_to_file(folders, version, name, dtype, tmp_path):
    folder = folders[version]
    names = None
    if MADE[version]["mezo"][name]["names"] == "none":
        names = {str(i): n for i, n in enumerate(runs.LOG_ORDER)}
    base, log, out = (
        folder / "start" / f"{dtype}.safetensors",
        folder / "mezo" / name / f"{dtype}.zolog",
        tmp_path / "out",
    )
    replay_file(base, log, out, names=names)
    end = weights(folder / "mezo" / name / f"{dtype}.safetensors", torch.device("cpu"))
    assert differing(load_file(out), end) == []


@pytest.mark.parametrize(("version", "name"), RESUMED)
def test_a_saved_run_resumes_to_the_same_end(folders, version, name, device):
    folder = folders[version]
    run = MADE[version]["mezo"][name]
    dtype, half = run["half"]["dtype"], run["half"]["step"]
    saved = torch.load(folder / "mezo" / name / f"{dtype}.half.pt", weights_only=True)
    end = weights(folder / "mezo" / name / f"{dtype}.safetensors", device)
    log = ZoLog.load(folder / "mezo" / name / f"{dtype}.zolog")
    order = [] if run["names"] == "none" else runs.LOG_ORDER

    def replayed(found: runs.Weights, log: ZoLog, **part: int) -> runs.Weights:
        replay_(found if order else [found[n] for n in runs.LOG_ORDER], log, **part)
        return found

    halfway = {n: w.to(device) for n, w in saved["weights"].items()}
    assert differing(replayed(start(folder, dtype, device), log, stop=half), halfway) == []
    model = runs.tiny(halfway)
    opt = runs.mezo(model, run, joined=half > runs.JOINED)
    opt.load_state_dict(saved["optimizer"])
    assert opt.steps == half
    assert list(opt.log.steps()) == list(log.steps(stop=half))
    runs.take(opt, model, range(half, runs.STEPS))

    assert differing(runs.parameters(model), end) == []
    assert state_digests(opt.state_dict()) == run["states"]
    assert list(opt.log.steps()) == list(log.steps())
    assert opt.log.params() == log.params()
    assert differing(replayed(start(folder, dtype, device), opt.log), end) == []
    assert differing(replayed(halfway, log, start=half), end) == []


@of_each("wrapped")
def test_a_log_with_the_names_of_wrappers_replays_onto_the_plain_model(folders, version, name, device, tmp_path):
    folder = folders[version]
    made = MADE[version]["wrapped"][name]
    log = ZoLog.load(folder / "wrapped" / f"{name}.zolog")
    assert [runs.plain_name(n) for n in made["names"]] == runs.LOG_ORDER
    assert made["names"] != runs.LOG_ORDER
    end = weights(folder / "wrapped" / f"{name}.safetensors", device)

    by_position = start(folder, made["dtype"], device)
    replay_([by_position[n] for n in runs.LOG_ORDER], log)
    assert differing(by_position, end) == []

    for names in (None, {e["name"]: runs.plain_name(e["name"]) for e in log.params()}):
        model = runs.tiny(start(folder, made["dtype"], device))
        replay_(model, log, names=names)
        assert differing(runs.parameters(model), end) == []
        replay_file(folder / "start" / f"{made['dtype']}.safetensors", log, tmp_path / "out", names=names)
        assert differing(weights(tmp_path / "out", device), end) == []


@pytest.mark.parametrize("version", MADE)
def test_the_log_of_a_run_that_died_replays_up_to_its_last_step(folders, version, device):
    folder = folders[version]
    with pytest.warns(UserWarning, match="did not close its log"):
        log = ZoLog.load(folder / "odd_logs" / "unclosed.zolog")
    assert len(log) == MADE[version]["odd_logs"]["unclosed"]
    found = start(folder, "bfloat16", device)
    replay_(found, log)
    assert differing(found, weights(folder / "odd_logs" / "unclosed.safetensors", device)) == []


@pytest.mark.parametrize("version", MADE)
def test_a_log_with_checksums_between_its_steps_replays(folders, version, device):
    folder = folders[version]
    log = ZoLog.load(folder / "odd_logs" / "long.zolog")
    assert len(log) == MADE[version]["odd_logs"]["long"] > 4096
    found = {"w": runs.long_start().to(device)}
    replay_(found, log)
    assert differing(found, weights(folder / "odd_logs" / "long.safetensors", device)) == []


# --- pools ----------------------------------------------------------------------------------------------------------


@of_each("pools")
def test_a_pool_reads_back_and_moves_weights_as_it_did(folders, version, name, device):
    made = MADE[version]["pools"][name]
    data = (folders[version] / "pools" / f"{name}.zopool").read_bytes()
    pool = SeedPool.from_bytes(data)
    assert pool.to_bytes(history=name != "sums") == data
    assert digest(runs.history(pool)) == made["history"]
    for dtype, wanted in made["applied"].items():
        model = runs.tiny(start(folders[version], dtype, device))
        pool.apply_(model, runs.POOL_LR)
        assert digest(leaves(runs.parameters(model))) == wanted, dtype


@pytest.mark.parametrize("version", MADE)
def test_a_client_continues_a_pool(folders, version, device):
    made = MADE[version]["pools"]["pairs"]
    pool = SeedPool.from_bytes((folders[version] / "pools" / "pairs.zopool").read_bytes())
    model = runs.tiny(start(folders[version], "bfloat16", device))
    runs.pool_steps(pool, model, runs.CANDIDATES)
    assert digest(leaves(runs.parameters(model))) == made["stepped"]
    assert hashlib.sha256(pool.to_bytes()).hexdigest() == made["bytes"]


# --- SM3 ------------------------------------------------------------------------------------------------------------


@of_each("sm3")
def test_a_saved_state_of_sm3_continues_to_the_same_end(folders, version, name, device):
    folder = folders[version] / "sm3"
    run = MADE[version]["sm3"][name]
    saved = torch.load(folder / f"{name}.half.pt", weights_only=True)
    params, opt = runs.sm3({n: w.to(device) for n, w in saved["weights"].items()}, run)
    opt.load_state_dict(saved["optimizer"])
    assert state_digests(opt.state_dict()) == state_digests(saved["optimizer"])
    runs.sm3_take(params, opt, range(run["half"], runs.SM3_STEPS))
    assert differing(params, weights(folder / f"{name}.safetensors", device)) == []
    assert state_digests(opt.state_dict()) == run["states"]


@of_each("sm3")
def test_a_run_of_sm3_from_its_start_ends_as_it_did(folders, version, name, device):
    run = MADE[version]["sm3"][name]
    params, opt = runs.sm3({n: w.to(device) for n, w in runs.sm3_start(run).items()}, run)
    runs.sm3_take(params, opt, range(runs.SM3_STEPS))
    assert differing(params, weights(folders[version] / "sm3" / f"{name}.safetensors", device)) == []
    assert state_digests(opt.state_dict()) == run["states"]


# --- what trains ----------------------------------------------------------------------------------------------------


@of_each("selections")
def test_a_saved_selection_draws_as_it_did(folders, version, name):
    made = MADE[version]["selections"][name]
    saved = torch.load(folders[version] / "selections" / f"{name}.pt", weights_only=True)
    _, selection = runs.selection(name)
    selection.load_state_dict(saved)
    assert selection.state_dict() == saved
    if name == "tensors":
        assert sorted(selection.trainable) == made["trainable"]
        later = [list(selection.select(importance=i).names) for i in runs.importances(selection)]
        assert later == made["later"]
    else:
        assert runs.draws(selection, range(made["half"], runs.SELECTION_STEPS)) == made["draws"]


# --- operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", MADE)
def test_operators_give_the_bits_that_they_gave(version, device):
    wanted = MADE[version]["operators"]
    found = operators.digests(device)
    assert [name for name, value in wanted.items() if found.get(name) != value] == []


def test_the_reference_gives_the_bits_that_operators_gave():
    """Every seventh call, among which are all distributions, dtypes, roundings and momenta."""
    environment = os.environ | {"LEANOPS_DISABLE": "cpu", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", "release.operators", "7"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert not result["native"]
    for made in MADE.values():
        shared = made["operators"].keys() & result["digests"].keys()
        assert len(shared) > 20
        assert [n for n in sorted(shared) if made["operators"][n] != result["digests"][n]] == []
