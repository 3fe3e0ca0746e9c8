"""What the optimizers share: parameters and their memory, and questions to an optimizer about its abilities."""
