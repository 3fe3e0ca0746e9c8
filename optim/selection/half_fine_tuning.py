"""Half fine-tuning: in each round half of each category's matrices train, and the other half stays unchanged."""

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
    r"""Half of each category's matrices train in a round, the other half stays unchanged; the next round draws anew.

    A matrix is a weight with its bias (``q_proj.weight`` and ``q_proj.bias`` are one matrix). **The rule:** of a
    category's n matrices in a block,

    .. math:: \lfloor n / 2 \rfloor \text{ train, and one more in half of the blocks where } n \text{ is odd}

    So N / 2 of a category's N matrices in the model train, rounded up or down if N is odd. The draw is uniform: each
    matrix trains in a round with probability one half, independently of other rounds. As published, in each block two
    of q, k, v and o and one of two norms train; of gate, up and down two train in half of the blocks and one in the
    other blocks. Every draw takes the smallest keys ``philox(seed, round, index)``; if the number of blocks with odd n
    is odd, the lowest bit of a key rounds their half. If no category has two matrices and the rule selects none, the
    matrix with the smallest key trains.

    Frozen matrices have no gradients, no gradient computation and no optimizer state.

    Args:
        model, optimizer: see :class:`LISA`.
        period: steps a round; None: a round lasts until :meth:`next_round` (published: one for each task or stage).
        blocks: see :class:`LISA`. A model without a ``nn.ModuleList`` is one block if blocks is None. The parameters
            outside the blocks form one more block.
        categories: name and regular expression of each category. A matrix belongs to the first category whose
            expression is found in its name, so order matters. The name has no final ``weight`` or ``bias``, and case is
            ignored. The default is norm, embedding (the head included), attention and mlp (:data:`CATEGORIES`), and
            modules of an embedding's or norm's type belong to those categories whatever their name. Matrices that match
            no expression are in the category ``"other"``.
        always: a regular expression to search in parameters' names, or modules and parameters. These train in every
            round and belong to no category, such as a head that starts untrained.
        seed: the draws follow from it and from the number of the round.

    ``categories`` has the names of each category's matrices.

    Raises:
        TypeError, ValueError: see :class:`LISA`; an invalid regular expression. Nothing is frozen then.

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
        """Names of the matrices to draw from, without their ``weight`` or ``bias``."""
        return list(self._matrices)

    @property
    def categories(self) -> dict[str, list[str]]:
        """The matrices of each category."""
        names = self.matrices
        return {c: [names[i] for b in blocks.values() for i in b] for c, blocks in self._strata.items()}

    def next_round(self) -> None:
        """Draw anew, and free the state of the frozen parameters. Raises RuntimeError if ``period`` is set."""
        if self.period is not None:
            raise RuntimeError(f"HalfFineTuning.next_round: rounds follow from period, {self.period}; set it to None")
        self._enter(self._round + 1)
        self._freezer.free()
        self._stale = False

    def _draw(self, round_: int) -> set[str]:
        chosen: list[int] = []
        # the keys of blocks and of the rounding take indices above those of the matrices
        key = len(self._matrices)
        for blocks in self._strata.values():
            odd = [key + i for i, indices in enumerate(blocks.values()) if len(indices) % 2]
            n = len(odd) // 2
            if len(odd) % 2:
                n += seeds.derive(self.seed, round_, key + len(blocks), stream=streams.DRAW_SEEDS) & 1
            more = set(smallest(self.seed, round_, odd, n))
            for i, indices in enumerate(blocks.values()):
                chosen += smallest(self.seed, round_, indices, math.floor(len(indices) / 2) + (key + i in more))
            key += len(blocks) + 1
        if not chosen and not self._always:
            chosen = smallest(self.seed, round_, range(len(self._matrices)), 1)
        names = list(self._matrices.values())
        return self._always.union(*(names[i] for i in chosen))


def _kinds(model: nn.Module) -> dict[str, str]:
    """Matrix name -> category, for the modules whose type gives the category."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Embedding | nn.EmbeddingBag):
            found[name] = "embedding"
        elif isinstance(m, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase):
            found[name] = "norm"
    return found
