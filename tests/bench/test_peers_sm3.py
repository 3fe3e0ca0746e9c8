"""Peers do the work that they are timed for."""

from __future__ import annotations

import pytest
import torch

from leanops import _registry
from leanops.bench.peers import Unavailable, subjects
from leanops.sm3.cases import Options, numbers, step_inputs

SHAPES = [(33, 40), (64,), (4, 5, 6), ()]


def inputs(dtype=None, momentum=0.9):
    options = Options(dtype, momentum=momentum)
    args = list(step_inputs(SHAPES, options, torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0)))
    for t in [*args[2], *args[3], *args[4]]:
        t.zero_()  # a new optimizer's state
    args[5] = numbers(1e-4)
    return args


def peer_step(name, args):
    """The peer's step over the operator's arguments."""
    peer = next(p for p in subjects()["sm3_step_"].peers if p.name == name)
    return peer.make(_registry.spec("sm3_step_").bind(*args))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_pytorch_optimizer_takes_the_same_steps(dtype):
    pytest.importorskip("pytorch_optimizer", reason="needs pytorch-optimizer: pip install 'leanops[bench]'")
    args, theirs = inputs(dtype), inputs(dtype)
    call = peer_step("pytorch_optimizer SM3", theirs)  # its first step
    for _ in range(4):
        call()
    start = [p.clone() for p in args[0]]
    for _ in range(5):
        _registry.spec("sm3_step_").op(*args)
    for mine, other, before in zip(args[0], theirs[0], start, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)
        assert (mine - before).abs().max() > 5e-5


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("torch AdamW fused", "torch"),
        ("torchao AdamW8bit", "torchao"),
        ("bitsandbytes AdamW8bit", "bitsandbytes"),
    ],
)
def test_a_peer_moves_every_parameter_and_leaves_the_gradients(name, package):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'leanops[bench]'")
    args = inputs(torch.int8)
    before = [t.clone() for t in (*args[0], *args[1])]
    call = peer_step(name, args)
    call()
    for now, then in zip(args[0], before, strict=False):
        assert (now != then).all()
        assert (now - then).abs().max() < 1e-3
    assert all(torch.equal(g, then) for g, then in zip(args[1], before[len(SHAPES) :], strict=True))


@pytest.mark.parametrize("name", ["torchao AdamW8bit", "bitsandbytes AdamW8bit"])
def test_eight_bit_peers_stand_beside_eight_bit_momentum_only(name):
    with pytest.raises(Unavailable, match="int8 momentum only"):
        peer_step(name, inputs(torch.float32))
