"""One writer at a time: a lock on a file that the system lets go of whenever the process ends, kill -9 included."""

import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from common.settings import UserError, show_path

try:
    import fcntl
except ModuleNotFoundError:  # Windows: no lock
    fcntl = None


class FileLock:
    """An exclusive lock, held from the making of the object to `release`.

    path: the lock file. It is made where it is missing, says who holds the lock, and goes with `release`. What a
        killed process left of it does not count.
    what: what the lock protects, for the message.

    Raises UserError, naming the holder, where another process has it. On a file system without locks nobody is
    refused, and a notice says so.
    """

    def __init__(self, path: Path, what: Path):
        self.path = path
        self._file = None
        while self._file is None:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed in release)
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(file)
                file.close()
                raise UserError(
                    f"another process writes {show_path(what)}: {holder}; fix: wait for it, stop it, or name another"
                ) from None
            except OSError as error:
                print(f"notice: {show_path(path)}: no lock here ({error.strerror}); start one process at a time")
            if _is_open_at(file, path):  # else the one who had it deleted the file: try with the new one
                self._file = file
            else:
                file.close()
        _held.add(self)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        with suppress(OSError):  # on a full disk the lock holds all the same
            self._file.truncate(0)
            self._file.write(json.dumps(about).encode())

    def release(self) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)  # while the lock is held: nobody else's file
            self._close()

    def _close(self) -> None:
        self._file.close()
        self._file = None
        _held.discard(self)


_held: set[FileLock] = set()


def _let_go_in_child() -> None:
    # A forked worker shares the lock. If it outlives a killed parent, the lock would outlive it too.
    for lock in list(_held):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _holder(file: BinaryIO) -> str:
    try:
        file.seek(0)
        about = json.loads(file.read(1000))
        return f"process {about['pid']} is writing on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock
        return "it has just begun"


def _is_open_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
