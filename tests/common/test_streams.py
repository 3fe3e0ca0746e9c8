"""No random bit serves two purposes: the table of Philox streams, held against what runs draw."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from leanops.common import streams

# with the libraries switched off, every block of a run is computed by the references
DRAWN = """
import json, torch
from leanops.common import philox, rounding
from leanops.optim import SM3, MeZO
from leanops.zo import reference

drawn = set()

def words_at(index, per_block, stream, seed, tensor_id):
    drawn.add((seed % 2**64, stream))
    return philox.words_at(index, per_block, stream, seed, tensor_id)

reference.words_at = rounding.words_at = words_at
w = torch.nn.Parameter(torch.randn(4, 8).bfloat16())
mezo = MeZO([w], lr=1.0, seed=7, distribution="lowrank", rounding="stochastic", perturb="copy")
for _ in range(2):
    mezo.step(lambda: w.float().sum())
of_mezo = sorted(drawn)
drawn.clear()
sm3 = SM3([w], lr=1.0, seed=7, stochastic_rounding=True, momentum=0.0)
for _ in range(2):
    w.grad = torch.ones_like(w)
    sm3.step()
print(json.dumps([of_mezo, sorted(drawn)]))
"""


def test_low_rank_noise_and_the_rounding_of_sm3_share_a_seed_but_no_bit():
    """Both derive their first seed in stream 6, so that one base seed gives both the same seed."""
    environment = {**os.environ, "LEANOPS_DISABLE": "cpu"}
    run = subprocess.run([sys.executable, "-c", DRAWN], env=environment, capture_output=True, text=True, check=True)
    of_mezo, of_sm3 = ({tuple(draw) for draw in drawn} for drawn in json.loads(run.stdout))
    assert {stream for _, stream in of_mezo} == {streams.ROUNDING, streams.LEFT, streams.RIGHT}
    assert {stream for _, stream in of_sm3} == {streams.ROUNDING}
    assert {seed for seed, _ in of_mezo} & {seed for seed, _ in of_sm3}, "the two runs must share a seed"
    assert not of_mezo & of_sm3
