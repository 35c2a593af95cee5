"""Files that survive being killed: whole or absent, and append-only lines with torn-tail recovery.

Knows bytes and paths only; what the lines mean is the caller's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from entropo.errors import DataError


def dump_json(value: Any) -> str:
    """One line of JSON, the same bytes for the same value; keys keep their order, NaN is refused."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def make_folder(path: str | Path) -> Path:
    """Creates a folder for output. Raises: DataError if a file stands there or it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError("a file stands where the output folder should be", file=path, hint="name another --out") from error
    except OSError as error:
        raise explain_os_error(error, path) from error
    return path


@contextlib.contextmanager
def write_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` for bytes; on success fsyncs and renames it, on failure removes it.

    Raises: DataError when the path is a folder, the disk is full or access is denied.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError("is a folder, expected a file to write", file=path, hint="name another output path")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise explain_os_error(error, path) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise explain_os_error(error, path) from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole text file atomically, UTF-8."""
    with write_atomic(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes one JSON document atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent) + "\n")


def write_lines(path: str | Path, rows: list[Any]) -> None:
    """Writes a whole JSONL file atomically, one row per line."""
    with write_atomic(path) as file:
        for row in rows:
            file.write(dump_json(row).encode("utf-8") + b"\n")


def recover_lines(path: str | Path) -> int:
    """Cuts a torn last line (one without a line feed) off a JSONL file; returns how many bytes were cut."""
    path = Path(path)
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
        return size - end


def append_line(path: str | Path, row: Any) -> None:
    """Appends one whole JSON line and fsyncs it. Call `recover_lines` once before the first append."""
    try:
        with Path(path).open("ab") as file:
            file.write(dump_json(row).encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explain_os_error(error, path) from error


def sync_folder(path: str | Path) -> None:
    """Makes a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain_os_error(error: OSError, path: str | Path) -> DataError:
    """An OSError as a DataError with the file and what to do."""
    hints: dict[int | None, str] = {
        errno.ENOSPC: "free some space, or name another output path; what was finished is kept, go on with --resume",
        errno.EACCES: "check the permissions, or name another path",
        errno.EROFS: "name a path that can be written",
        errno.ENOENT: "create the folder first, or check the spelling",
    }
    return DataError(
        f"cannot be written: {error.strerror or error}", file=path, hint=hints.get(error.errno, "name another path")
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
