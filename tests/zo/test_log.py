"""The log keeps a run in 4 bytes a step, survives the end of its process, and refuses what is damaged."""

from __future__ import annotations

import copy
import os
import resource
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zo.runs import run

from leanops.common import seeds
from leanops.common.philox import philox
from leanops.optim import LogError, MeZO, ZoLog, replay_
from leanops.optim.zo import replay as replay_module
from leanops.optim.zo.variants import strategy_of
from leanops.zo import reference


def test_a_step_costs_four_bytes_a_direction() -> None:
    for directions in (1, 3):
        p = nn.Parameter(torch.zeros(2))
        opt = MeZO([p], directions=directions)
        sizes = []
        for _ in range(40):
            opt.step(lambda p=p: p.sum())
            sizes.append(len(opt.log.to_bytes()))
        assert {b - a for a, b in pairwise(sizes[10:])} == {4 * directions}
    log = ZoLog({"directions": 1, "groups": 1, "params": []})
    for step in range(20_000):
        log.append([float(step)])
    assert len(log.to_bytes()) < 80_000 + 1000
    assert ZoLog.from_bytes(log.to_bytes()).scalars()[:, 0].tolist() == list(range(20_000))


def test_the_header_says_what_the_run_was() -> None:
    _, _, opt = run(torch.bfloat16, variant="one_sided", rounding="stochastic")
    header = ZoLog.from_bytes(opt.log.to_bytes()).header
    assert header["params"][0] == {"name": "0.weight", "id": 0, "shape": [4, 2, 3], "dtype": "bfloat16", "group": 0}
    assert header["zo"] == reference.VERSION
    assert header["seed"] == 2**64 - 3
    assert (header["variant"], header["rounding"], header["eps"]) == ("one_sided", "stochastic", 1e-3)


def test_changes_are_recorded_when_they_happen() -> None:
    _, _, opt = run(torch.float32)
    steps = list(opt.log.steps())
    rates = [s.groups[0]["lr"] for s in steps]
    assert [rate and round(2e-2 / rate) for rate in rates] == [1, 1, 1, 2, 2, 2, 3, 0, 3, 4, 4]
    assert [s.index for s in steps if s.frozen] == [4, 5]
    assert steps[4].frozen == {1}
    assert [s.index for s in steps if s.scalars is None] == [2]
    assert [s.index for s in steps if s.restart] == [4, 6]
    for field, value in (("lr", -1.0), ("momentum", 1.0), ("weight_decay", float("nan")), ("eps", 1e-3)):
        with pytest.raises(ValueError, match=f"ZoLog.set: field must be .* got '{field}' and {value}"):
            opt.log.set(0, field, value)


def test_a_file_grows_with_the_run_and_survives_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.zolog"
    p = nn.Parameter(torch.ones(3))
    opt = MeZO([p], lr=1e-2, log_file=path)
    for step in range(5):
        opt.step(lambda: p.sum())
        with pytest.warns(UserWarning, match=f"did not close its log; {step + 1} steps"):
            assert len(ZoLog.load(path)) == step + 1
    cut = path.read_bytes()[:-2]  # a crash in the middle of a write
    with pytest.warns(UserWarning, match="4 steps were recovered"):
        assert len(ZoLog.from_bytes(cut)) == 4
    opt.log.close()
    assert ZoLog.load(path).to_bytes() == opt.log.to_bytes()
    for _ in range(2):
        opt.step(lambda: p.sum())
        opt.log.save(path)  # onto its own file: complete, and the next step continues it
        assert ZoLog.load(path).to_bytes() == opt.log.to_bytes()
    assert len(opt.log) == 7
    with pytest.raises(FileExistsError, match="the file exists already"):
        MeZO([p], log_file=path).step(lambda: p.sum())
    resumed = MeZO([p], lr=1e-2, log_file=path)
    resumed.load_state_dict(opt.state_dict())
    resumed.step(lambda: p.sum())
    resumed.log.close()
    assert len(ZoLog.load(path)) == 8


def test_a_log_file_is_refused_before_the_first_evaluation(tmp_path: Path) -> None:
    p = nn.Parameter(torch.ones(3))
    taken = tmp_path / "taken.zolog"
    taken.write_bytes(b"something else")
    evaluations: list[int] = []

    def closure() -> Tensor:
        evaluations.append(1)
        return p.sum()

    for path, error, message in (
        (taken, FileExistsError, "the file exists already"),
        (tmp_path / "absent" / "run.zolog", FileNotFoundError, "the log's folder .*absent does not exist"),
    ):
        with pytest.raises(error, match=message):
            MeZO([p], log_file=path).step(closure)
    assert not evaluations
    assert p.equal(torch.ones(3))
    assert taken.read_bytes() == b"something else"


def test_a_resumed_run_continues_only_the_file_of_its_own_log(tmp_path: Path) -> None:
    """The file may hold more or other steps after those of the saved state. A file of anything else is not touched."""
    path = tmp_path / "run.zolog"
    p = nn.Parameter(torch.ones(3))
    opt = MeZO([p], lr=1e-2, log_file=path)
    states = []
    for _ in range(3):
        opt.step(lambda: p.sum())
        states.append(copy.deepcopy(opt.state_dict()))

    def resumed(state: dict[str, Any], path: Path) -> MeZO:
        again = MeZO([p], lr=1e-2, log_file=path)
        again.load_state_dict(state)
        again.step(lambda: p.sum())
        again.log.close()
        return again

    assert len(resumed(states[1], path).log) == 3  # the file went on to step 3 without closing
    assert len(resumed(states[0], path).log) == 2
    assert len(resumed(states[1], path).log) == 3  # another second step is in the file, but so is the state's first
    other = MeZO([p], lr=1e-2, seed=1)
    other.step(lambda: p.sum())
    for data in (other.log.to_bytes(), b"no log", b""):
        path.write_bytes(data)
        with pytest.raises(FileExistsError, match="the file exists and is not this run's log"):
            resumed(states[1], path)
        assert path.read_bytes() == data


def test_a_full_disk_costs_no_step(tmp_path: Path) -> None:
    """A step counts though its record cannot be written. The log in memory has it, and the next write adds it."""
    path = tmp_path / "run.zolog"
    p = nn.Parameter(torch.ones(3))
    opt = MeZO([p], lr=1e-2, log_file=path)
    opt.step(lambda: p.sum())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 2, hard))
        with pytest.raises(OSError, match="too large"):
            opt.step(lambda: p.sum())
        after = p.detach().clone()
        replayed = torch.ones(3)
        replay_([replayed], ZoLog.from_bytes(opt.log.to_bytes()))
        assert torch.equal(replayed, after)
        with pytest.raises(OSError, match="too large"):
            opt.log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    opt.step(lambda: p.sum())
    opt.log.close()
    assert ZoLog.load(path).to_bytes() == opt.log.to_bytes()
    assert opt.steps == 3
    replayed = torch.ones(3)
    replay_([replayed], path)
    assert torch.equal(replayed, p)


def test_saving_keeps_links_and_permissions_and_refuses_pipes(tmp_path: Path) -> None:
    _, _, opt = run(torch.float32)
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.touch(mode=0o600)
    link.symlink_to(target)
    os.mkfifo(pipe)
    opt.log.save(link)
    assert link.is_symlink()
    assert target.read_bytes() == opt.log.to_bytes()
    assert target.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match=r"not a regular file: .*pipe"):
        opt.log.save(pipe)
    assert pipe.is_fifo()


def test_damage_is_noticed(tmp_path: Path) -> None:
    _, _, opt = run(torch.float32)
    good = opt.log.to_bytes()
    path = tmp_path / "run.zolog"
    opt.log.save(path)
    assert path.read_bytes() == good
    with pytest.raises(LogError, match="not a log"):
        ZoLog.from_bytes(b"hello" * 10)
    with pytest.raises(LogError, match="version must be 01, got 02"):
        ZoLog.from_bytes(good[:6] + b"\x02" + good[7:])
    for end in (12, 40, len(good) - 4, len(good) - 40):
        with pytest.raises(LogError, match="truncated"):
            ZoLog.from_bytes(good[:end])
    start = len(good) - len(opt.log._body) - 16
    for place in [20, *range(start, len(good))]:
        for bit in range(8):
            with pytest.raises(LogError):
                ZoLog.from_bytes(flipped(good, place, bit))
    with pytest.raises(LogError, match="after the end"):
        ZoLog.from_bytes(good + b"more")
    with pytest.raises(LogError, match="all 11 steps are there, the checksum after them is not"):
        ZoLog.from_bytes(good[:-4])


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@pytest.mark.filterwarnings("ignore:.*did not close its log")
def test_damage_of_an_unfinished_log_is_noticed_or_reads_as_a_run(tmp_path: Path) -> None:
    """The last steps have no checksum. A changed number can pass unnoticed; any other damage cannot."""
    a, b = (nn.Parameter(torch.ones(n)) for n in (3, 2))
    opt = MeZO([a], lr=1e-2, momentum=0.5, log_file=tmp_path / "run.zolog")
    for step in range(4):
        if step == 2:
            opt.add_param_group({"params": [b], "lr": 0.5})
        a.requires_grad_(step != 1)
        opt.step(lambda: a.sum() + b.sum())
    opt.log.close()
    good = (tmp_path / "run.zolog").read_bytes()[:-16]
    start = len(good) - len(opt.log._body)
    refused = 0
    for place in range(start, len(good)):
        for bit in range(8):
            try:
                log = ZoLog.from_bytes(flipped(good, place, bit))
            except LogError:
                refused += 1
                continue
            assert len(replay_module.programs(log, strategy_of(log.header))) <= 2
            assert {e["group"] for e in log.params()} <= {0, 1}
            values = log.scalars()
            assert (values.dtype, values.shape) == ("float32", (len(log), 1))
    assert refused > 4 * (len(good) - start)


def test_seeds_follow_the_stated_rule() -> None:
    for base, step, direction in ((0, 0, 0), (7, 3, 2), (2**64 - 1, 2**40 + 5, 9)):
        counter = (step & 0xFFFFFFFF, step >> 32, direction, 3)
        words = philox(counter, (base & 0xFFFFFFFF, base >> 32))
        assert seeds.derive(base, step, direction) == int(words[0]) + (int(words[1]) << 32)
    many = seeds.derive_many(5, range(50), 1, stream=4)
    assert [int(s) % 2**64 for s in many] == [seeds.derive(5, k, 1, stream=4) for k in range(50)]
