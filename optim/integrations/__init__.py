"""Trainers: :mod:`leanops.integrations.transformers` for Hugging Face's, :mod:`leanops.integrations.lightning`."""
