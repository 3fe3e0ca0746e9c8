"""Its tests run in a copy of the repository that has the family; see tests/test_example_family.py."""

collect_ignore = ["tests"]
