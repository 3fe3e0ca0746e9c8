"""Files and folders that appear whole or not at all: each is written under another name and then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a temporary file in the same folder, then rename it: a reader sees the old file or the new one."""
    target = Path(os.path.realpath(path))  # through a link, which stays
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists() and not target.is_file():  # a device or a pipe, which the rename would remove
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # names the caller's path
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_new_folder(out: str | os.PathLike[str]) -> None:
    if os.path.lexists(os.path.abspath(out)):  # an empty path is the working folder
        raise FileExistsError(f"replay_file: out must be a folder that does not exist yet, got {out}")
    parent = Path(os.path.abspath(out)).parent
    if not parent.is_dir():
        raise FileNotFoundError(f"replay_file: out must lie in a folder that exists, got {out}")


@contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder beside ``out``, which is moved there whole at the end, or is removed."""
    check_new_folder(out)
    target = Path(os.path.abspath(out))
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        temporary.chmod(0o777 & ~_umask())
        check_new_folder(out)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
