"""The entry point of the ``leanops`` command, a package of its own.

Python imports ``leanops`` before any module in it, and that import needs torch and reads LEANOPS_CPU_ISA and
LEANOPS_DISABLE. What fails there is one line on standard error and exit status 2, as every other error of the command.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    try:
        from leanops.bench import cli
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("LEANOPS_TRACEBACK"):
            raise
        print(_line(error), file=sys.stderr)
        return 2
    return cli.main()


def _line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return "leanops: torch is not installed (pip install torch)"
    text = " ".join(str(error).split())
    if isinstance(error, ValueError) and text.startswith("leanops"):
        return text
    return f"leanops: the import fails: {type(error).__name__}: {text} (LEANOPS_TRACEBACK=1 shows where)"


if __name__ == "__main__":
    sys.exit(main())
