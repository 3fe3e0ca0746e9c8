"""The FLOPs that each tensor adds to a backward pass: torch's counter measures them on the graph of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

Edge = tuple[Node, int]


def _counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode  # takes longer to import than all of this package

    return FlopCounterMode(display=False)


@dataclass(frozen=True)
class BackwardFlops:
    """FLOPs of a backward pass, tensor by tensor.

    - ``names``: the tensors from the output to the input, in the order in which their gradients were complete.
    - ``forward``: FLOPs of the forward pass.
    - ``dw[k]``: FLOPs of the gradient of tensor k itself.
    - ``dy[k]``: FLOPs of the activations' gradients that tensor k needs and no tensor above it needs.
    - ``fixed``: FLOPs that every selection needs (for leaves that are not among the tensors).
    - ``groups``: pairs (tensors as bits, FLOPs that are spent if any of them trains). dw and dy are sums of them.
    """

    forward: int
    names: tuple[str, ...]
    dw: tuple[int, ...]
    dy: tuple[int, ...]
    fixed: int
    groups: tuple[tuple[int, int], ...]

    @property
    def backward(self) -> int:
        """FLOPs of the backward pass if all tensors train."""
        return self.fixed + sum(flops for _, flops in self.groups)

    def cost(self, trainable: Collection[str]) -> int:
        """FLOPs of the backward pass if these train: the counter's result, or more (see :func:`measure`)."""
        mask = sum(1 << i for i, name in enumerate(self.names) if name in trainable)
        return self.fixed + sum(flops for group, flops in self.groups if group & mask)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists. Sets of tensors are hexadecimal: ``torch.load`` reads no integer so long."""
        lists = {name: list(getattr(self, name)) for name in ("names", "dw", "dy")}
        return {**asdict(self), **lists, "groups": [[hex(group), flops] for group, flops in self.groups]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> BackwardFlops:
        """Raises KeyError, TypeError or ValueError for a state that :meth:`state_dict` did not make."""
        forward, fixed = int(state["forward"]), int(state["fixed"])
        names = tuple(map(str, state["names"]))
        dw, dy = (tuple(map(int, state[name])) for name in ("dw", "dy"))
        if not len(names) == len(dw) == len(dy):
            raise ValueError(f"names, dw and dy must have one length, got {len(names)}, {len(dw)} and {len(dy)}")
        return cls(forward, names, dw, dy, fixed, tuple((int(group, 16), int(n)) for group, n in state["groups"]))


def measure(op: str, closure: Callable[[], Any], params: Mapping[str, Tensor]) -> BackwardFlops:
    """Measure the backward pass of ``closure()`` by tensor. All params must require grad. Call in :func:`undisturbed`.

    The function runs the graph backward once and reads torch's counter before and after each node. A node may cost
    FLOPs and pass gradients along several edges: a product does so, to its weight and to its input. Such a node is then
    run alone for each edge, with zeros as incoming gradients. An edge is needed when a trainable tensor lies behind it,
    so the cost of every set of tensors is known. If the edges' costs do not add up to the node's cost (attention in one
    kernel computes all its gradients at once), the node counts in full when any edge is needed. The count is then never
    too low.

    Each gradient is dropped when it is complete, so memory holds at most one at a time.
    """
    with _counter() as counter:
        loss, root = _loss(op, closure, params)
    forward = counter.get_total_flops()
    nodes = _nodes(root)
    flops, shapes, order = _count_nodes(loss, nodes, params)
    names = {id(p): name for name, p in params.items()}
    leaves = {names[id(v)] for v in (getattr(n, "variable", None) for n in nodes) if id(v) in names}
    missing = [name for name in order if name not in leaves]
    if missing:
        raise RuntimeError(
            f"{op}: the gradient of {missing[0]} does not come through the graph of the loss; measure without "
            "activation checkpointing"
        )
    order += sorted(leaves.difference(order))  # in the graph, but without a gradient
    behind = _tensors_behind(nodes, {id(params[name]): i for i, name in enumerate(order)})
    other = 1 << len(order)
    groups: Counter[int] = Counter()
    for node in nodes:
        if flops.get(node):
            groups.update(_split(node, flops[node], shapes[node], behind))
    fixed = sum(n for group, n in groups.items() if group & other)
    free = tuple(sorted((group, n) for group, n in groups.items() if not group & other and group))
    dw, dy = [0] * len(order), [0] * len(order)
    for group, n in free:
        first = (group & -group).bit_length() - 1
        (dw if group == 1 << first else dy)[first] += n
    return BackwardFlops(forward, tuple(order), tuple(dw), tuple(dy), fixed, free)


def count(op: str, closure: Callable[[], Any], params: Mapping[str, Tensor]) -> tuple[int, int]:
    """FLOPs of the forward and the backward pass with the tensors that train now. Call in :func:`undisturbed`."""
    with _counter() as forward:
        loss, _ = _loss(op, closure, params)
    with _counter() as backward, _dropped(params):
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def gradients(
    op: str, closure: Callable[[], Any], params: Mapping[str, Tensor], seen: Callable[[str, Tensor], None]
) -> None:
    """One backward pass: calls ``seen(name, parameter)`` for each complete gradient and then drops the gradient."""
    loss, _ = _loss(op, closure, params)
    with _dropped(params, seen):
        loss.backward()


def _loss(op: str, closure: Callable[[], Any], params: Mapping[str, Tensor]) -> tuple[Tensor, Node]:
    """The loss and the root of its unused graph; ValueError if the closure has called backward or returned no loss."""
    loss = closure()
    used = [name for name, p in params.items() if p.grad is not None]
    if used:
        raise ValueError(f"{op}: closure must return the loss and not call backward, got a gradient of {used[0]}")
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
        got = f"{list(loss.shape)}, grad_fn {loss.grad_fn}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{op}: closure must return a scalar loss that has a graph, got {got}")
    return loss, loss.grad_fn


@contextmanager
def _dropped(params: Mapping[str, Tensor], seen: Callable[[str, Tensor], None] | None = None) -> Iterator[None]:
    """Pass each gradient of a backward pass to ``seen`` and then drop it."""

    def hook(name: str) -> Callable[[Tensor], None]:
        def drop(p: Tensor) -> None:
            if seen is not None:
                seen(name, p)
            p.grad = None

        return drop

    handles = [p.register_post_accumulate_grad_hook(hook(n)) for n, p in params.items() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module, params: Mapping[str, Tensor], trainable: Collection[str]) -> Iterator[None]:
    """Within it, ``trainable`` train and no parameter has a gradient at the start. Afterwards all that a measurement
    changes is restored: gradients, ``requires_grad``, random generators, and buffers (running statistics, also buffers
    that the forward pass replaces)."""
    slots = [(m._buffers, dict(m._buffers.items())) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    before = {name: (p.requires_grad, p.grad) for name, p in params.items()}
    devices = {p.device for p in params.values() if p.device.type != "cpu"}
    kind = next((d.type for d in devices), "cuda")
    try:
        for name, p in params.items():
            p.requires_grad_(name in trainable)
            p.grad = None
        with torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind), torch.enable_grad():
            yield
    finally:
        for name, p in params.items():
            needs, p.grad = before[name]
            p.requires_grad_(needs)
        for held, bound in slots:
            for name in [n for n, _ in held.items() if n not in bound]:
                del held[name]
            for name, buffer in bound.items():
                if name not in held or held[name] is not buffer:
                    held[name] = buffer
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


# --- the graph ------------------------------------------------------------------------------------------------------


def _nodes(root: Node) -> list[Node]:
    """The root and every node below it, each after all nodes that it leads to."""
    found: dict[Node, None] = {}
    stack: list[tuple[Node, bool]] = [(root, False)]
    entered: set[Node] = set()
    while stack:
        node, done = stack.pop()
        if done:
            found[node] = None
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
    return list(found)


def _tensors_behind(nodes: list[Node], index: Mapping[int, int]) -> dict[Node, int]:
    """The tensors behind each node, as bits. The bit after the last tensor's is for all other leaves."""
    found: dict[Node, int] = {}
    for node in nodes:
        leaf = getattr(node, "variable", None)
        if leaf is not None and not node.next_functions:
            found[node] = 1 << index.get(id(leaf), len(index))
        else:
            found[node] = 0
            for n, _ in node.next_functions:
                if n is not None:
                    found[node] |= found[n]
    return found


Shapes = list[tuple[torch.Size, torch.dtype, torch.device] | None]


def _count_nodes(
    loss: Tensor, nodes: list[Node], params: Mapping[str, Tensor]
) -> tuple[dict[Node, int], dict[Node, Shapes], list[str]]:
    """One backward pass: each node's FLOPs and incoming gradients, and the order in which gradients are complete."""
    counter = _counter()
    started: dict[Node, int] = {}
    flops: dict[Node, int] = {}
    shapes: dict[Node, Shapes] = {}
    order: list[str] = []

    def before(node: Node) -> Callable[..., None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            shapes[node] = [None if g is None else (g.shape, g.dtype, g.device) for g in grads]
            started[node] = counter.get_total_flops()

        return hook

    def after(node: Node) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            flops[node] = flops.get(node, 0) + counter.get_total_flops() - started[node]

        return hook

    inner = [n for n in nodes if n.next_functions]
    handles = [n.register_prehook(before(n)) for n in inner] + [n.register_hook(after(n)) for n in inner]
    try:
        # on one thread: nodes of several devices would otherwise run at once and mix their counts
        with (
            counter,
            torch.autograd.set_multithreading_enabled(False),
            _dropped(params, lambda name, _: order.append(name)),
        ):
            loss.backward(retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return flops, shapes, order


def _split(node: Node, flops: int, shapes: Shapes, behind: Mapping[Node, int]) -> dict[int, int]:
    """A node's FLOPs, split by the set of tensors (as bits) that needs them."""
    edges = dict.fromkeys((n, i) for n, i in node.next_functions if n is not None)
    whole = 0
    for n, _ in edges:
        whole |= behind[n]
    if len(edges) > 1:
        found: Counter[int] = Counter()
        for edge in edges:
            found[behind[edge[0]]] += _edge_flops(node, edge, shapes)
        if sum(found.values()) == flops:
            return found
    return {whole: flops}


def _edge_flops(node: Node, edge: Edge, shapes: Shapes) -> int:
    """FLOPs of a node that computes one edge's gradient only."""
    counter = _counter()
    totals: list[int] = []  # the counter before and after the node
    known = [(i, s) for i, s in enumerate(shapes) if s is not None]
    grads = [torch.zeros(shape, dtype=dtype, device=device) for _, (shape, dtype, device) in known]
    handles = [
        node.register_prehook(lambda *_: totals.append(counter.get_total_flops())),
        node.register_hook(lambda *_: totals.append(counter.get_total_flops())),
    ]
    try:
        with counter, torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(
                [GradientEdge(node, i) for i, _ in known],
                [GradientEdge(*edge)],
                grad_outputs=grads,
                retain_graph=True,
                allow_unused=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    return totals[1] - totals[0]
