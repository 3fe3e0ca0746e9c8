"""Code that the families share: dtypes, checks, seeds and streams, Philox, rounding, exact arithmetic, launching."""
