"""The zeroth-order optimizers: MeZO with its log and replay, and SeedPool."""
