"""The statistics behind every ratio, on samplers whose true ratio is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leanops.autotune import measure
from leanops.autotune.measure import interleave, median, paired_ratio, unpaired_ratio


def _times(generator, rounds, true, drift=0.3, noise=0.03):
    """A and B = true * A in rounds: both share the machine's drift, each has noise of its own."""
    shared = np.exp(np.cumsum(drift * generator.standard_normal(rounds)))
    a, b = (shared * np.exp(noise * generator.standard_normal(rounds)) for _ in range(2))
    return true * b, a


def test_paired_interval_covers_the_true_ratio_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        ratio = paired_ratio(*_times(generator, 25, true=1.3), resamples=500)
        covered += ratio.low <= 1.3 <= ratio.high
    assert 0.89 * 300 <= covered <= 300


def test_drift_that_both_share_cancels():
    b, a = _times(np.random.default_rng(2), 50, true=2.0, drift=0.5, noise=0.01)
    ratio = paired_ratio(b, a)
    assert ratio.value == pytest.approx(2.0, rel=0.02)
    assert ratio.spread < 0.02
    assert unpaired_ratio(b, a).spread > 0.2


def test_unpaired_interval_covers_the_true_ratio():
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        a, b = np.exp(0.1 * generator.standard_normal((2, 25)))
        ratio = unpaired_ratio(1.1 * b, a, resamples=500)
        covered += ratio.low <= 1.1 <= ratio.high
    assert covered >= 0.89 * 200


def test_median_interval_holds_the_median_and_narrows_with_samples():
    generator = np.random.default_rng(4)
    few, many = (median(np.exp(0.1 * generator.standard_normal(n))) for n in (10, 1000))
    for interval in (few, many):
        assert interval.low <= interval.value <= interval.high
    assert many.spread < few.spread / 3


@pytest.mark.parametrize("samples", [[], [1.0, 0.0], [1.0, float("nan")]])
def test_bad_samples_are_refused(samples):
    with pytest.raises(ValueError, match="positive times"):
        median(samples)


def test_paired_lists_must_be_equally_long():
    with pytest.raises(ValueError, match="same length, got 2 and 3"):
        paired_ratio([1.0, 1.0], [1.0, 1.0, 1.0])


class Machine:
    """A clock that reads simulated time: calls take what their name says, and the machine slows down steadily."""

    def __init__(self, slope=0.02, noise=0.01):
        self.generator, self.slope, self.noise, self.turns, self.order = np.random.default_rng(5), slope, noise, 0, []

    def __call__(self, call, inner=1):
        self.turns += 1
        self.order.append(call())
        return call() * inner * (1 + self.slope * self.turns) * np.exp(self.noise * self.generator.standard_normal())

    def now(self):
        return 0.0

    def settle(self):
        pass


@pytest.mark.parametrize("order", ["abba", "random"])
def test_interleaving_recovers_the_ratio_on_a_machine_that_slows_down(order):
    samples = interleave(
        {"a": lambda: 0.004, "b": lambda: 0.006}, clock=Machine(), rounds=(40, 40), sample_s=1e-3, order=order
    )
    ratio = paired_ratio(samples.seconds["b"], samples.seconds["a"])
    assert ratio.low <= 1.5 <= ratio.high
    assert ratio.value == pytest.approx(1.5, rel=0.03)
    floor = samples.noise_floor()
    assert floor.low <= 1.0 <= floor.high


def test_abba_reverses_every_second_round():
    machine = Machine()
    interleave({"a": lambda: 1.0, "b": lambda: 2.0}, clock=machine, rounds=(2, 2), sample_s=1e-3)
    assert machine.order[2:] == [1.0, 2.0, 1.0, 1.0, 2.0, 1.0]  # the first two are the calibration's


def test_a_against_a_on_this_machine():
    x = torch.ones(100_000)
    samples = interleave({"a": lambda: x.add_(1.0)}, budget_s=0.5, rounds=(20, 60))
    assert samples.noise_floor().value == pytest.approx(1.0, abs=0.5)
    assert len(samples.seconds["a"]) == len(samples.again) >= 20


def test_calibration_makes_samples_long_enough():
    machine = Machine(slope=0, noise=0)
    inner, seconds = measure.calibrate(machine, lambda: 1e-6, sample_s=2e-3)
    assert inner >= 2000
    assert seconds == pytest.approx(1e-6)


def test_the_time_budget_ends_the_rounds():
    x = torch.ones(1000)
    samples = interleave({"a": lambda: x.add_(1.0)}, budget_s=0.2, rounds=(3, 10_000), sample_s=5e-3)
    assert 3 <= len(samples.seconds["a"]) <= 40


def test_rotation_takes_copies_in_turn():
    seen = []
    call = measure.rotating([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(6):
        call()
    assert sorted(seen[:3]) == [0, 1, 2]
    assert seen[:3] == seen[3:]
