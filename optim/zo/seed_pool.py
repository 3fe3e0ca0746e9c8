"""FedKSeed: federated fine-tuning of all parameters through K seeds and K scalars."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._compile import _disable_dynamo

from leanops.common import seeds as seed_rule
from leanops.common import streams
from leanops.common.checks import finite, integer, integers, is_integer, one_of
from leanops.optim.common import parameters
from leanops.optim.common.parameters import Params
from leanops.optim.zo.directions import Noise, Seed
from leanops.optim.zo.estimate import Evaluator
from leanops.optim.zo.processes import Reduction
from leanops.optim.zo.slots import Slot, slot_of
from leanops.optim.zo.strategy import Spsa
from leanops.optim.zo.update import apply_
from leanops.optim.zo.whole_files import replacing
from leanops.zo import VERSION

# by history_starts_with_zero: a reader that does not know the option refuses a pool that has it
_MAGIC = {False: b"ZOPOOL\x01\n", True: b"ZOPOOL\x02\n"}
_MAGIC_SIZE = 8
_HEAD = struct.Struct("<QIBBBxdI")  # seed, size, distribution, rounding, kind of the body, clip, number of pairs
_DISTRIBUTIONS = ("gaussian", "rademacher")
_ROUNDINGS = ("nearest", "stochastic")
_PAIRS, _SUMS, _FULL = 0, 1, 2


def _index_dtype(size: int) -> np.dtype[Any]:
    """The dtype of candidates' numbers in a file."""
    return np.dtype("<u2") if size <= 65536 else np.dtype("<u4")


def _checksum(magic: bytes, rest: bytes) -> int:
    """CRC-32 of what follows the checksum. That of the option covers the magic too, which alone tells the option."""
    return zlib.crc32(magic + rest if magic == _MAGIC[True] else rest)


def _fp32(op: str, name: str, values: Any) -> NDArray[np.float32]:
    """The values rounded to fp32; ValueError for one that is not finite there."""
    wide = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        rounded = wide.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{op}: {name} must be finite in fp32, got {wide[~np.isfinite(rounded)][0]:g}")
    return rounded


class SeedPool:
    r"""K candidate seeds, and one scalar a candidate: together they are the whole difference between two models.

    .. math::

        \theta = \theta_0 - \eta \sum_k a_k\, z(s_k), \qquad a_k \leftarrow a_k + \sum_c w_c\, a_{k,c}

    A client samples candidates from the server's pool, and takes steps along them (:meth:`step_`), which note (k, g)
    in an empty pool of its own. It returns this pool; the server merges the pools with weights
    :math:`w_c = n_c / \sum n`. Candidates with larger :math:`|g|` are sampled more often:

    .. math::

        p = \text{softmax}\Big(\frac{A - \min A}{\max A + 10^{-10} - \min A}\Big), \qquad
        A_k = \text{mean}_j\, |\text{clip}(g_{kj}, \pm 1000)|

    and uniformly while there is no history (a candidate without history has :math:`A_k = 0`). This is the formula of
    the paper: A_k is the sum of n amplitudes divided by n. The published code divides by n + 1, because its histories
    start with a 0; see ``history_starts_with_zero``. The pool keeps and sends all sums in fp32, so that every site
    computes the same weights.

    Args:
        size: K, published: 1,024 to 4,096.
        seed: the pool's seed; candidate k's seed follows from it (:mod:`leanops.common.seeds`, stream 4).
        distribution, rounding: as in :func:`leanops.zo_axpy_`.
        clip: bound of |g| in an amplitude.
        history_starts_with_zero: count one 0 in every candidate's history, so that n amplitudes are divided by n + 1. A
            candidate that was measured once then has half its amplitude. It changes :meth:`probabilities` only, and is
            saved with the pool. Pools that differ in it can be merged.

    Published settings: ε 5e-4, η 3e-7, 200 local steps; under 18 KB a round.
    Source: FedKSeed (2312.06353).
    """

    @_disable_dynamo  # in a compiled function NumPy computes, not Dynamo's imitation of it, which lacks uint64
    def __init__(
        self,
        size: int = 4096,
        seed: int = 0,
        *,
        distribution: str = "gaussian",
        rounding: str = "nearest",
        clip: float = 1000.0,
        history_starts_with_zero: bool = False,
    ) -> None:
        if not is_integer(size) or not 1 <= size < 2**32:
            raise ValueError(f"SeedPool: size must be an integer in [1, 2^32), got {size!r}")
        one_of("SeedPool", "distribution", distribution, _DISTRIBUTIONS)
        one_of("SeedPool", "rounding", rounding, _ROUNDINGS)
        if isinstance(clip, (str, bytes)):
            raise TypeError(f"SeedPool: clip must be a number > 0, got {clip!r}, which is text")
        if not isinstance(clip, (int, float, np.integer, np.floating)) or not clip > 0:
            raise ValueError(f"SeedPool: clip must be a number > 0, got {clip!r}")
        if not isinstance(history_starts_with_zero, bool):
            raise TypeError(
                f"SeedPool: history_starts_with_zero must be True or False, got {history_starts_with_zero!r}"
            )
        self.history_starts_with_zero = history_starts_with_zero
        self.size, self.seed = int(size), seed_rule.check("SeedPool", seed)
        self.distribution, self.rounding, self.clip = distribution, rounding, float(clip)
        self.seeds: NDArray[np.int64] = seed_rule.derive_many(
            self.seed, np.arange(self.size, dtype=np.uint64), stream=streams.POOL_SEEDS
        )
        self.sums: NDArray[np.float32] = np.zeros(self.size, np.float32)  # a_k
        self.amplitudes: NDArray[np.float32] = np.zeros(self.size, np.float32)  # sum over j of |clip g_kj|
        self.counts: NDArray[np.uint32] = np.zeros(self.size, np.uint32)  # how many g_kj
        self._evaluator: Evaluator | None = None
        self._pairs: list[tuple[int, float]] | None = []  # every (k, g) of add(); None after merge()

    def __repr__(self) -> str:
        used = int(np.count_nonzero(self.counts))
        return f"SeedPool(size={self.size}, seed={self.seed}, {self.distribution!r}, {used} candidates with history)"

    @property
    def _noise(self) -> Noise:
        return Noise(self.distribution)

    # --- learning -----------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def probabilities(self) -> NDArray[np.float64]:
        """[K]: the probability that :meth:`sample` draws each candidate."""
        counts = self.counts.astype(np.int64) + self.history_starts_with_zero
        a = np.divide(self.amplitudes, counts, out=np.zeros(self.size), where=self.counts > 0)
        weights = np.exp((a - a.min()) / (a.max() + 1e-10 - a.min()))
        p: NDArray[np.float64] = weights / weights.sum()
        return p

    @_disable_dynamo
    def sample(self, n: int = 1, *, generator: np.random.Generator | int | None = None) -> list[int]:
        """n candidates, with replacement. ``generator``: NumPy's, or a number to seed one."""
        op = "SeedPool.sample"
        if not is_integer(n) or n < 0:
            raise ValueError(f"{op}: n must be an integer >= 0, got {n!r}")
        try:
            rng = np.random.default_rng(generator)
        except (TypeError, ValueError) as error:
            text = f"generator must be NumPy's or a number that seeds one, got {generator!r}"
            raise ValueError(f"{op}: {text}") from error
        chosen = rng.choice(self.size, size=n, p=self.probabilities())
        return [int(k) for k in chosen]

    @_disable_dynamo
    def add(self, k: int, g: float) -> None:
        """Add a scalar that was measured along candidate k, rounded to fp32. ValueError, and nothing changes, if the
        scalar or the candidate's sum is not finite in fp32."""
        k = integer("SeedPool.add", "k", k, self.size)
        self._note(k, *self._sums_with("SeedPool.add", k, finite("SeedPool.add", "g", g)))

    def _sums_with(self, op: str, k: int, g: float) -> tuple[float, float, float]:
        """g in fp32, and candidate k's sum and amplitude after it."""
        value = float(_fp32(op, "g", g))
        bounded = float(np.float32(min(abs(value), self.clip)))
        return (
            value,
            float(_fp32(op, f"the sum of candidate {k}", float(self.sums[k]) + value)),
            float(_fp32(op, f"the amplitude of candidate {k}", float(self.amplitudes[k]) + bounded)),
        )

    def _note(self, k: int, value: float, total: float, amplitude: float) -> None:
        self.sums[k], self.amplitudes[k] = total, amplitude
        self.counts[k] += 1
        if self._pairs is not None:
            self._pairs.append((k, value))

    @_disable_dynamo
    def merge(self, other: SeedPool, weight: float = 1.0) -> None:
        """a <- a + weight * other's a. The other's amplitudes join the history without the weight."""
        op = "SeedPool.merge"
        if not isinstance(other, SeedPool):
            raise TypeError(f"{op}: other must be a SeedPool, got {type(other).__name__}")
        for name in ("size", "seed", "distribution", "clip"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"{op}: {name} must be {mine} in both pools, got {theirs}")
        weight = finite(op, "weight", weight)
        with np.errstate(over="ignore"):
            sums = _fp32(op, "sums", self.sums.astype(np.float64) + weight * other.sums.astype(np.float64))
        amplitudes = _fp32(op, "amplitudes", self.amplitudes.astype(np.float64) + other.amplitudes)
        self.sums, self.amplitudes, self.counts = sums, amplitudes, self.counts + other.counts
        self._pairs = None

    @_disable_dynamo
    @torch.no_grad()
    def apply_(self, params: Params, lr: float, *, tensor_ids: Sequence[int] | None = None) -> None:
        r""":math:`\theta \leftarrow \theta - \eta \sum_k a_k z(s_k)` in one pass over the weights.

        Candidates with :math:`a_k = 0` are left out. Only parameters that require grad move, or all if none does.

        Args:
            params: a module, a mapping, (name, tensor) pairs or tensors. A parameter's id is its position among all.
            lr: η.
            tensor_ids: other ids, one a parameter.
        """
        slots = self._slots("SeedPool.apply_", params, tensor_ids)
        lr = finite("SeedPool.apply_", "lr", lr)
        used = np.flatnonzero(self.sums)
        if not used.size or not slots:
            return
        coeffs = (-lr * self.sums[used].astype(np.float64)).tolist()
        apply_(slots, list(map(Seed, self.seeds[used].tolist())), coeffs, 0.0, self._noise, self.rounding)

    @_disable_dynamo
    @torch.no_grad()
    def step_(
        self, params: Params, closure: Callable[[], Any], k: int, *, lr: float = 3e-7, eps: float = 5e-4
    ) -> float:
        """A client's step along candidate k: measure g, move the parameters by -lr g z, ``add(k, g)``; returns g.

        It moves the same parameters as :meth:`apply_`. After the evaluations the weights are exactly what they were, as
        in :class:`leanops.optim.MeZO`. A loss that is not finite raises FloatingPointError and changes nothing.
        """
        op = "SeedPool.step_"
        slots = self._slots(op, params)
        if not callable(closure):
            raise TypeError(f"{op}: closure must be a function without arguments, got {type(closure).__name__}")
        k, lr, eps = integer(op, "k", k, self.size), finite(op, "lr", lr), finite(op, "eps", eps, 0.0, above=True)
        seed = [Seed(int(self.seeds[k]) % 2**64)]
        evaluator = self._evaluator = self._evaluator or Evaluator("auto", Spsa(self._noise), None, True)
        (g,), _ = evaluator.estimate(closure, slots, seed, eps, Reduction(None, "none", 1), op)
        if not math.isfinite(g):
            raise FloatingPointError(
                f"{op}: a loss, or the estimate from it in fp32, is not finite; nothing was changed"
            )
        sums = self._sums_with(op, k, g)
        apply_(slots, seed, [-lr * g], 0.0, self._noise, self.rounding)
        self._note(k, *sums)
        return g

    def _slots(self, op: str, params: Params, tensor_ids: Sequence[int] | None = None) -> list[Slot]:
        """The slots of the parameters that require grad, or of all if none does."""
        pairs, _ = parameters.named(op, params)
        ids = list(range(len(pairs))) if tensor_ids is None else integers(op, "tensor_ids", tensor_ids, 2**32)
        if len(ids) != len(pairs):
            raise ValueError(f"{op}: tensor_ids must have one entry a parameter ({len(pairs)}), got {len(ids)}")
        none_requires_grad = not any(p.requires_grad for _, p in pairs)
        moved = [(i, n, p) for i, (n, p) in zip(ids, pairs, strict=True) if none_requires_grad or p.requires_grad]
        for _, name, p in moved:
            parameters.check(op, name, p)
        slots = [slot_of(op, name, i, p) for i, name, p in moved]
        parameters.check_apart(op, ((s.name, s.local) for s in slots))
        return slots

    # --- files and messages -------------------------------------------------------------------------------------------

    @_disable_dynamo
    def to_bytes(self, *, history: bool = True) -> bytes:
        """The pool's state: a client's pairs at 6 bytes each, or the sums at 4 bytes a candidate (12 with the history).

        Without ``history`` the receiver gets the weights but samples uniformly. A round at the published settings stays
        under 18 KB in both directions together (down: K 4,096 without history, or K 1,024 with it; up: 200 pairs).
        """
        pairs = self._pairs
        index = _index_dtype(self.size)
        if pairs is not None and len(pairs) * (index.itemsize + 4) <= self.size * (12 if history else 4):
            kind = _PAIRS
            body = np.array([k for k, _ in pairs], index).tobytes() + np.array([g for _, g in pairs], "<f4").tobytes()
        else:
            kind, body = _SUMS, self.sums.astype("<f4").tobytes()
            if history:
                kind = _FULL
                body += self.amplitudes.astype("<f4").tobytes() + self.counts.astype("<u4").tobytes()
        head = _HEAD.pack(
            self.seed,
            self.size,
            _DISTRIBUTIONS.index(self.distribution),
            _ROUNDINGS.index(self.rounding),
            kind,
            self.clip,
            len(pairs) if kind == _PAIRS and pairs is not None else 0,
        )
        magic = _MAGIC[self.history_starts_with_zero]
        return magic + struct.pack("<I", _checksum(magic, head + body)) + head + body

    @classmethod
    @_disable_dynamo
    def from_bytes(cls, data: bytes) -> SeedPool:
        """The pool that :meth:`to_bytes` wrote; ValueError for anything else."""
        op = "SeedPool.from_bytes"
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"{op}: data must be bytes, got {type(data).__name__}")
        data = bytes(data)
        start = _MAGIC_SIZE + 4 + _HEAD.size
        if data[:_MAGIC_SIZE] not in _MAGIC.values() or len(data) < start:
            raise ValueError(f"{op}: not a pool of this version ({VERSION}): it starts with {data[:8]!r}")
        if struct.unpack_from("<I", data, _MAGIC_SIZE)[0] != _checksum(data[:_MAGIC_SIZE], data[_MAGIC_SIZE + 4 :]):
            raise ValueError(f"{op}: damaged: the checksum does not fit")
        seed, size, distribution, rounding, kind, clip, count = _HEAD.unpack_from(data, _MAGIC_SIZE + 4)
        pool = cls(
            size,
            seed,
            distribution=_DISTRIBUTIONS[distribution],
            rounding=_ROUNDINGS[rounding],
            clip=clip,
            history_starts_with_zero=data[:_MAGIC_SIZE] == _MAGIC[True],
        )
        body = data[start:]
        if kind == _PAIRS:
            index = _index_dtype(size)
            ks = np.frombuffer(body, index, count)
            for k, g in zip(ks.tolist(), np.frombuffer(body, "<f4", count, ks.nbytes).tolist(), strict=True):
                pool.add(k, g)
            return pool
        pool._pairs = None
        pool.sums = _fp32(op, "sums", np.frombuffer(body, "<f4", size))
        if kind == _FULL:
            pool.amplitudes = _fp32(op, "amplitudes", np.frombuffer(body, "<f4", size, 4 * size))
            pool.counts = np.frombuffer(body, "<u4", size, 8 * size).copy()
        return pool

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pool; the file appears whole or not at all."""
        with replacing(path) as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SeedPool:
        return cls.from_bytes(Path(path).read_bytes())
