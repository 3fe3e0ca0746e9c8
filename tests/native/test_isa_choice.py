"""LEANOPS_CPU_ISA forces an instruction set. A set that this processor lacks, or an unknown one, is an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("leanops_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.cpu_isa(), module.cpu_isa_error(), sep="|")
"""


def choice(native, wish: str) -> list[str]:
    environment = {**os.environ, "LEANOPS_CPU_ISA": wish}
    command = [sys.executable, "-c", SCRIPT, native.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().split("|")


@pytest.mark.parametrize("wish", ["baseline", "avx2", "avx512"])
def test_a_wish_is_followed_where_the_machine_can(native, wish):
    isa, error = choice(native, wish)
    if wish in native.isas():
        assert (isa, error) == (wish, "")
    else:
        assert isa == ""
        assert f"LEANOPS_CPU_ISA={wish}" in error
        assert native.isas()[-1] in error


def test_without_a_wish_the_best_is_taken(native):
    assert choice(native, "") == [native.isas()[-1], ""]


def test_an_unknown_wish_is_an_error(native):
    assert choice(native, "avx1024") == ["", "LEANOPS_CPU_ISA must be baseline, avx2 or avx512, got 'avx1024'"]
