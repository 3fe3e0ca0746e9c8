"""The family's tests run in a copy of the repository, see tests/test_example_family.py."""

collect_ignore = ["tests"]
