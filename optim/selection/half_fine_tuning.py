"""Half fine-tuning: in each round half of the matrices of each category train, the others keep what they know."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from leanops.common import seeds, streams
from leanops.optim.selection.blocks import Blocks, Named, find_blocks, find_params
from leanops.optim.selection.rounds import Rounds, smallest

CATEGORIES: Mapping[str, str] = {
    "norm": r"norm|(^|[._])ln(_?\w{1,2})?([._]|$)|batchnorm|(^|\.)bn\d*([._]|$)",
    "embedding": r"embed|(^|\.)(wte|wpe|shared|lm_head|embed_out)([._]|$)",
    "attention": r"att(n|ention)|(^|\.)([qkvo]_proj|out_proj|qkv(_proj)?|w?qkv)([._]|$)",
    "mlp": r"mlp|(^|[._])ffn?([._\d]|$)|feed_?forward|experts|(^|\.)(fc\d*|linear\d|w[123]|(gate|up|down)_proj)([._]|$)"
    r"|intermediate|output\.dense|DenseReluDense",
}


class HalfFineTuning(Rounds):
    r"""Half of each category's matrices train in a round, the other half stays as it is; the next round draws anew.

    A matrix is a weight with the bias beside it (``q_proj.weight`` and ``q_proj.bias`` are one). **The rule:** in every
    block, of a category's n matrices

    .. math:: \lfloor n / 2 \rfloor \text{ train, and one more in half of the blocks where } n \text{ is odd}

    so that of a category's N matrices in all, N / 2 train, rounded up or down if N is odd. Which ones is uniform: each
    matrix trains in a round with probability one half, independently of other rounds. So in each block two of q, k, v
    and o train, one of two norms, and of gate, up and down two in half of the blocks and one in the others, as
    published. All choices are those with the smallest keys ``philox(seed, round, index)``; rounding of an odd number
    of odd blocks is the key's lowest bit. Where all this leaves nothing to train, for no category has two matrices, the
    matrix with the smallest key does.

    Frozen matrices have no gradients, no gradient computation and no optimizer state.

    Args:
        model, optimizer: see :class:`LISA`.
        period: steps a round; None: a round lasts until :meth:`next_round` (published: one for each task or stage).
        blocks: see :class:`LISA`; a model without them (None, and no ``nn.ModuleList``) is one block. What lies outside
            the blocks is treated as a block of its own.
        categories: name and regular expression of each category. A matrix belongs to the first whose expression is
            found in its name (without the weight's own, in any case), so order matters. By default norm, embedding
            (the head included), attention and mlp (:data:`CATEGORIES`); modules that are embeddings or norms by type
            count as such. What matches none is of the category ``"other"``.
        always: a regular expression found in parameters' names, or modules and parameters, that train in every round
            and in no category: a head that starts untrained, for one.
        seed: the draws follow from it and from the number of the round.

    ``categories`` tells the names of each category's matrices.

    Raises:
        TypeError, ValueError: see :class:`LISA`; an expression that is none. Nothing is frozen then.

    Source: HFT (2404.18466), whose text leaves the order of the draws open.
    """

    _SETTINGS = ("categories", "blocks", "always")

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        period: int | None = None,
        blocks: Blocks = None,
        categories: Mapping[str, str] | None = None,
        always: Named = (),
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, period, seed)
        module, params = self._freezer.model, self._freezer.params
        self._always = find_params("HalfFineTuning", "always", module, params.keys(), always)
        if categories is not None and not isinstance(categories, Mapping):
            raise ValueError(
                f"HalfFineTuning: categories must map names to regular expressions, got {type(categories).__name__}"
            )
        patterns = {}
        for name, text in (CATEGORIES if categories is None else categories).items():
            try:
                patterns[name] = re.compile(text, re.IGNORECASE)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"HalfFineTuning: categories must hold regular expressions, got {text!r} for {name!r}"
                ) from error
        self._matrices: dict[str, list[str]] = {}
        for name in params:
            if name not in self._always:
                self._matrices.setdefault(re.sub(r"[._]?(weight|bias)$", "", name), []).append(name)
        lists = any(isinstance(m, nn.ModuleList) and len(m) for m in module.modules())
        found = find_blocks("HalfFineTuning", module, blocks) if lists or blocks is not None else {}
        kinds = _kinds(module) if categories is None else {}
        # category -> block -> indices of its matrices
        self._strata: dict[str, dict[str, list[int]]] = {}
        self._blocks = list(found)
        for i, matrix in enumerate(self._matrices):
            block = next((b for b in found if matrix == b or matrix.startswith(f"{b}.")), "")
            kind = kinds.get(matrix) or next((c for c, p in patterns.items() if p.search(matrix)), "other")
            self._strata.setdefault(kind, {}).setdefault(block, []).append(i)
        self._apply()

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices that are drawn from, without their ``weight`` or ``bias``."""
        return list(self._matrices)

    @property
    def categories(self) -> dict[str, list[str]]:
        """The matrices of each category."""
        names = self.matrices
        return {c: [names[i] for b in blocks.values() for i in b] for c, blocks in self._strata.items()}

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks."""
        return list(self._blocks)

    @property
    def always(self) -> list[str]:
        """Names of the parameters that train in every round."""
        return sorted(self._always)

    def next_round(self) -> None:
        """Draw anew, and free the state of what is frozen now. Raises RuntimeError where a period does so."""
        if self.period is not None:
            raise RuntimeError(f"HalfFineTuning.next_round: rounds follow from period, {self.period}; make it None")
        self._enter(self._round + 1)
        self._freezer.free()
        self._stale = False

    def _draw(self, round_: int) -> set[str]:
        chosen: list[int] = []
        # keys of blocks and of the rounding: indices that no matrix has
        key = len(self._matrices)
        for blocks in self._strata.values():
            odd = [key + i for i, of in enumerate(blocks.values()) if len(of) % 2]
            n = len(odd) // 2
            if len(odd) % 2:
                n += seeds.derive(self.seed, round_, key + len(blocks), stream=streams.DRAW_SEEDS) & 1
            more = set(smallest(self.seed, round_, odd, n))
            for i, of in enumerate(blocks.values()):
                chosen += smallest(self.seed, round_, of, math.floor(len(of) / 2) + (key + i in more))
            key += len(blocks) + 1
        if not chosen and not self._always:
            chosen = smallest(self.seed, round_, range(len(self._matrices)), 1)
        names = list(self._matrices.values())
        return self._always.union(*(names[i] for i in chosen))


def _kinds(model: nn.Module) -> dict[str, str]:
    """Categories that follow from a module's type, by the matrix's name."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Embedding | nn.EmbeddingBag):
            found[name] = "embedding"
        elif isinstance(m, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase):
            found[name] = "norm"
    return found
