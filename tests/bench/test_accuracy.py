"""No speed without a right result; the arithmetic of gate and roofline."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from leanops import _registry
from leanops._registry import Cost
from leanops.autotune.measure import Clock
from leanops.bench import accuracy, roofline
from leanops.bench.measurement import Measurement
from leanops.bench.peers import subjects
from leanops.bench.plan import Job, Settings
from leanops.bench.results import PeerResult

WRONG = """
import dataclasses, json, sys
import torch, leanops
from leanops import _registry
from leanops.bench.peers import subjects
from leanops.bench.measurement import Measurement
from leanops.bench.plan import Job, Settings

spec = _registry.spec("zo_noise_")
def kernel(call):
    spec.reference(call)
    if sys.argv[1] == "wrong":
        call.out.view(-1)[-1] = call.out.view(-1)[-1].nextafter(torch.tensor(9.0))
_registry.implement("zo_noise_", "CPU", kernel)
case = next(c for c in spec.cases if c.name == "gaussian-257x3")
job = Job(spec, subjects()["zo_noise_"], case, case.name, torch.float32, 1)
measurement = Measurement(job, Settings(quick=True), torch.device("cpu"), {})
measurement.take()
print(json.dumps(dataclasses.asdict(measurement.row)))
"""


@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_a_backend_that_is_wrong_in_one_last_bit_shows_no_speed(kind, tmp_path):
    environment = os.environ | {"LEANOPS_DISABLE": "cpu"}
    command = [sys.executable, "-c", WRONG, kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    if kind == "right":
        assert row["status"] == "ok"
        assert row["median_s"] > 0
        assert row["gate"]["passed"]
    else:
        assert row["status"] == "wrong"
        assert not row["gate"]["passed"]
        assert "differs from the reference" in row["reason"]
        for name in ("median_s", "low_s", "high_s", "ns_per_element", "gb_per_s", "gflop_per_s", "percent_of_roofline"):
            assert row[name] is None
        assert row["samples_s"] == []
        assert row["peers"] == []


@pytest.mark.parametrize("name", sorted(subjects()))
def test_every_subject_is_gated_timed_and_set_beside_its_peers(name):
    spec, subject = _registry.spec(name), subjects()[name]
    case = next(c for c in spec.cases if not c.bench)
    measurement = Measurement(
        Job(spec, subject, case, case.name, torch.float32, 1), Settings(quick=True), torch.device("cpu"), {}
    )
    measurement.take()
    measurement.place(roofline.Roofline("cpu", 1, dict.fromkeys(PATTERNS, 1e9), {"float32": 1e9}, 1e-6))
    row = measurement.row
    assert row.status == "ok", row.reason
    assert row.median_s is not None
    assert row.floor_s is not None
    assert row.percent_of_roofline == pytest.approx(100 * row.floor_s / row.median_s)
    assert row.dispatch_s is not None
    assert row.dispatch_s > 0
    assert any(peer.available for peer in row.peers)
    for peer in row.peers:
        if peer.available:
            assert peer.ratio_low <= peer.ratio <= peer.ratio_high
        else:
            assert peer.reason


@pytest.mark.parametrize("name", sorted(subjects()))
def test_probes_notice_one_wrong_element_wherever_they_look(name):
    spec, subject = _registry.spec(name), subjects()[name]
    case = next(c for c in spec.cases if not c.bench)
    args = case.make(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
    probes = subject.probes(spec.bind(*args))
    wanted = accuracy.expected(spec, probes)
    returned = spec.op(*args)
    for probe, values in zip(probes, wanted, strict=True):
        actual = probe.actual(returned)
        assert accuracy.error(actual, values) < 1e-4
        if actual[0].numel():
            actual[0][(-1,) * actual[0].dim()] += 1.0
            assert accuracy.error(probe.actual(returned), values) > 1e-2
            actual[0][(-1,) * actual[0].dim()] -= 1.0


def test_error_counts_nan_and_infinity_on_one_side_as_infinite():
    x = torch.tensor([1.0, math.nan, math.inf])
    assert accuracy.error([x], [x.clone()]) == 0.0
    for other in ([1.0, 2.0, math.inf], [1.0, math.nan, 1.0], [math.nan, math.nan, math.inf]):
        assert accuracy.error([torch.tensor(other)], [x]) == math.inf
        assert accuracy.error([x], [torch.tensor(other)]) == math.inf
    assert accuracy.error([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 5.0])]) == pytest.approx(0.2)


PATTERNS = (roofline.FILL, roofline.IN_PLACE, roofline.COPY, roofline.READ, roofline.TRIAD)
ROOF = roofline.Roofline(
    "cpu", 1, {"fill": 2e9, "in-place add": 4e9, "copy": 3e9, "read": 5e9, "triad": 3e9}, {"float32": 100e9}, 1e-6
)


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    memory = ROOF.floor(Cost(read=3_000, written=3_000), "copy")
    assert memory.seconds == pytest.approx(2e-6)
    assert memory.bound == "memory (copy)"
    busy = Cost(read=3_000, written=3_000, flops=1_000_000, flops_dtype=torch.float32)
    assert ROOF.floor(busy, "copy").seconds == pytest.approx(1e-5)
    assert ROOF.floor(busy, "copy").bound == "GEMM float32"
    idle = Cost(read=3_000, written=3_000, flops=10, flops_dtype=torch.float32)
    assert ROOF.floor(idle, "copy").bound == "memory (copy)"


SLOW_IN_16_BIT = replace(ROOF, gemm={"float32": 90e9, "bfloat16": 0.9e9, "float16": 200e9, "float64": 40e9})


@pytest.mark.parametrize(
    ("dtype", "rate", "way"),
    [
        (torch.bfloat16, 90e9, "GEMM float32 of widened bfloat16"),  # torch has no fast bf16 product there
        (torch.float16, 200e9, "GEMM float16"),
        (torch.float32, 90e9, "GEMM float32"),
        (torch.float64, 40e9, "GEMM float64"),  # fp32 would be another result
    ],
)
def test_the_ceiling_is_the_best_way_to_the_same_result(dtype, rate, way):
    floor = SLOW_IN_16_BIT.floor(Cost(read=3, written=3, flops=9_000_000, flops_dtype=dtype), "copy")
    assert floor.seconds == pytest.approx(9_000_000 / rate)
    assert floor.bound == way


def placed(own_s, peers, dtype=torch.bfloat16, same=("same",)):
    """The row of a product of 9 MFLOP that takes so long, beside peers that do."""
    spec = _registry.spec("zo_linear")
    job = Job(spec, subjects()["zo_linear"], spec.cases[0], "case", dtype, 1)
    measurement = Measurement(job, Settings(), torch.device("cpu"), {})
    measurement.cost, measurement.pattern = Cost(read=3, written=3, flops=9_000_000, flops_dtype=dtype), "copy"
    measurement.row.median_s, measurement.same_result = own_s, set(same)
    measurement.row.peers = [PeerResult(name, median_s=seconds) for name, seconds in peers.items()]
    measurement.place(SLOW_IN_16_BIT)
    return measurement.row


def test_a_row_that_widens_is_held_against_the_product_in_fp32():
    row = placed(200e-6, {})
    assert row.percent_of_roofline == pytest.approx(50.0)  # 5555% of torch's own bf16 product
    assert row.bound == "GEMM float32 of widened bfloat16"
    assert row.reason == ""


def test_a_peer_with_the_same_result_is_a_ceiling_too():
    row = placed(200e-6, {"same": 50e-6, "other": 1e-6})
    assert row.percent_of_roofline == pytest.approx(25.0)
    assert row.bound == "same"


@pytest.mark.parametrize("own_s", [99e-6, 10e-6, 1e-9])
def test_no_row_shows_more_than_all_that_the_machine_can_do(own_s):
    row = placed(own_s, {"same": 300e-6})
    assert row.percent_of_roofline == 100.0
    assert row.floor_s == own_s
    assert "% faster than the machine's measured rates allow" in row.reason


def test_a_rate_is_measured_in_bounded_time_however_slow_the_product(monkeypatch):
    sizes = []

    class Slow(Clock):
        """Products of this machine: 1 GFLOP/s in bf16, 100 in fp32."""

        time = 0.0

        def now(self):
            return self.time

        def __call__(self, call, inner=1):
            a = call.args[0]
            sizes.append((a.dtype, len(a)))
            seconds = inner * 2 * len(a) ** 3 / (1e9 if a.dtype == torch.bfloat16 else 100e9)
            self.time += seconds
            return seconds

    clock, effort = Slow(torch.device("cpu")), roofline.Effort.of(quick=True)
    for dtype, rate, size in ((torch.bfloat16, 1e9, 256), (torch.float32, 100e9, 1024)):
        before = clock.time
        assert roofline._product(clock, torch.device("cpu"), dtype, effort) == pytest.approx(rate)
        assert max(n for d, n in sizes if d == dtype) == size
        assert clock.time - before < 1.0


def test_how_bytes_move_decides_which_bandwidth_bounds():
    assert roofline.pattern(Cost(read=0, written=8), argument_bytes=8, mutates=True) == roofline.FILL
    assert roofline.pattern(Cost(read=8, written=8), argument_bytes=8, mutates=True) == roofline.IN_PLACE
    assert roofline.pattern(Cost(read=8, written=8), argument_bytes=16, mutates=True) == roofline.COPY
    assert roofline.pattern(Cost(read=800, written=8), argument_bytes=800, mutates=False) == roofline.READ


def test_the_ceiling_is_the_better_of_two_measurements_and_drift_is_their_ratio():
    slow = roofline.Roofline("cpu", 1, {k: v / 2 for k, v in ROOF.bandwidth.items()}, {"float32": 150e9}, 2e-6)
    best = ROOF.best(slow)
    assert best.bandwidth == ROOF.bandwidth
    assert best.gemm == {"float32": 150e9}
    assert best.dispatch_s == 1e-6
    assert ROOF.drift(slow) == pytest.approx(1.0)
    assert slow.drift(ROOF) == pytest.approx(1.0)
    assert ROOF.drift(ROOF) == 0.0
