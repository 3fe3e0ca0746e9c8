"""Callbacks and adapters for trainers."""
