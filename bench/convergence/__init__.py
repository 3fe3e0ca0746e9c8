"""``leanops convergence``: one language model trained by each optimizer, and what came of it."""
