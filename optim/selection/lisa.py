"""LISA: a few randomly drawn blocks train at a time."""

from __future__ import annotations

from typing import Any

from leanops.optim.selection.blocks import Blocks, Named, find_blocks, find_params
from leanops.optim.selection.rounds import Rounds, at_least, smallest


class LISA(Rounds):
    r"""Layerwise importance sampling: in each round γ of the N blocks train; the other parts of the model always train.

    .. math::

        S_r = \text{the } \gamma \text{ blocks } b \text{ with the smallest keys } \text{philox}(\text{seed}, r, b),
        \qquad r = \lfloor t / K \rfloor

    The draw is uniform without replacement, anew every K steps. In a round a block is drawn with probability γ / N and
    each pair with probability γ(γ - 1) / (N(N - 1)), independently of other rounds. Frozen blocks have no gradients, no
    gradient computation, and no optimizer state: Adam keeps 8 bytes a parameter for γ blocks instead of N.

    ::

        opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
        lisa = LISA(model, opt, active=2, period=20)
        for batch in data:
            loss_of(model, batch).backward()
            opt.step()
            lisa.step()
            opt.zero_grad()

    Args:
        model: any module. LISA ignores parameters that do not require grad when it is made, so adapters and partly
            frozen models work without changes.
        optimizer: any torch optimizer that keeps its state by parameter and holds all parameters that require grad;
            make it before LISA. If it counts steps by parameter group (``group["step"]``), blocks that train again do
            not start as in a new optimizer, and LISA warns.
        active: γ, published: 2 (of 32), up to 8.
        period: K, published: 3 to 50 draws over a run, that is tens to hundreds of steps.
        blocks: the blocks to draw from. Blocks without a trainable parameter are not counted.

            - None: the entries of the model's only stack, the ``nn.ModuleList`` that has two or more trainable entries.
              A model with several stacks is refused.
            - A container's name (``"model.layers"``): its children.
            - A regular expression that must match a block's whole name (``r"encoder\.block\.\d+"``).
            - A list of modules or names.
        always: the parameters that train in every round. None: all parameters outside the blocks (embeddings, head,
            final norm). A regular expression to search in parameters' names, or a list of modules and parameters: these
            train, and all others outside the blocks stay frozen. A parameter that several blocks share trains when one
            of them is active.
        seed: the draws follow from it and from the number of the round.

    ``active_blocks`` has the names of the blocks that train now. ``attach`` counts steps by a hook.
    :func:`leanops.optim.trainer_callback` is for Hugging Face's Trainer. With ``state_dict`` a run resumes to the same
    bits, in the middle of a round too.

    DistributedDataParallel: wrap the model before making LISA, with ``find_unused_parameters=True``.

    Raises:
        TypeError: model or optimizer of the wrong kind.
        ValueError: more active blocks than the model has; blocks or always that match nothing; no blocks given for a
            model with no stack or several; an optimizer without one of the trainable parameters; a model that LISA,
            HalfFineTuning or TensorSelector has frozen and not released. Nothing is frozen then.

    Source: LISA (2403.17919), algorithm 1.
    """

    _SETTINGS = ("active", "blocks", "always")

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        active: int = 2,
        period: int = 20,
        blocks: Blocks = None,
        always: Named | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, at_least("LISA", "period", period, 1), seed)
        params, module = self._freezer.params, self._freezer.model
        names = {id(p): n for n, p in params.items()}
        self._blocks: dict[str, set[str]] = {}
        for block, m in find_blocks("LISA", module, blocks).items():
            inside = {names[id(p)] for p in m.parameters() if id(p) in names}
            if inside:
                self._blocks[block] = inside
        self.active = at_least("LISA", "active", active, 1)
        if self.active > len(self._blocks):
            raise ValueError(
                f"LISA: active must be at most the number of blocks with trainable parameters, {len(self._blocks)}, "
                f"got {active}"
            )
        sampled = set().union(*self._blocks.values())
        self._always = (
            {n for n in params if n not in sampled}
            if always is None
            else find_params("LISA", "always", module, params.keys(), always)
        )
        self._apply()

    @property
    def active_blocks(self) -> list[str]:
        """Names of the blocks that train now."""
        return self._drawn(self._round)

    def _drawn(self, round_: int) -> list[str]:
        names = self.blocks
        return [names[i] for i in smallest(self.seed, round_, range(len(names)), self.active)]

    def _draw(self, round_: int) -> set[str]:
        return self._always.union(*(self._blocks[b] for b in self._drawn(round_)))
