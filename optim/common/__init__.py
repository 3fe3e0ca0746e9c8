"""What the optimizers share: parameters and their memory, and what an optimizer can tell of itself."""
