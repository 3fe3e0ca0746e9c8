"""What ``leanops convergence`` found: the same in Python and in its JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field

from leanops.bench.convergence.corpus import Facts
from leanops.bench.convergence.settings import Settings
from leanops.bench.results import Results


@dataclass
class Trial:
    """One learning rate in one round of tuning. ``validation_bits`` is None where it diverged."""

    round: int
    lr: float
    steps: int
    validation_bits: float | None


@dataclass
class Against:
    """Differences to another method: the row's value minus the other's, and ratios of the row's to the other's.

    The interval of the loss is a bootstrap over the test text's windows, paired; it does not cover other seeds.
    """

    test_bits: float
    test_bits_low: float
    test_bits_high: float
    tokens_per_s: float
    tokens_per_s_low: float
    tokens_per_s_high: float
    peak_bytes: int | None
    state_bytes: int
    state_ratio: float


@dataclass
class TrainingRow:
    """One method's run. Losses are in bits a byte."""

    key: str
    label: str
    settings: str
    all_train: bool
    lr: float
    rates: list[float]
    edge: bool  # the rate is the lowest or the highest of its grid
    tuning: list[Trial]
    diverged: int | None  # at which step
    parameters: int
    losses: list[float | None]  # one a step
    curve: list[tuple[int, float]]  # step, loss of the validation text
    train_bits: float | None
    test_bits: float | None
    test_windows: list[float] | None
    seconds: list[tuple[float, float]]  # the step, the optimizer's part of it
    tokens_per_s: float
    tokens_per_s_quartiles: tuple[float, float]
    optimizer_s: float
    forward_backward_s: float
    peak_bytes: int | None
    state_bytes: int
    state_bytes_per_parameter: float
    resumed: int
    against: Against | None = None
    against_adafactor: Against | None = None


@dataclass(kw_only=True)
class TrainingResults(Results):
    SCHEMA = "leanops-convergence/1"

    settings: Settings
    text: Facts
    sm3_served_by: str
    proves_nothing: bool
    steps: int
    parameters: int | None
    baseline: str
    peak_how: str
    drift: float | None
    rows: list[TrainingRow] = field(default_factory=list)
