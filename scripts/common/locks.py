"""One writer at a time: a lock on a file that the system lets go of whenever the process ends, kill -9 included."""

import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

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
        self._fd = None
        while self._fd is None:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(fd)
                os.close(fd)
                raise UserError(
                    f"another process writes {show_path(what)}: {holder}; fix: wait for it, stop it, or name another"
                ) from None
            except OSError as error:
                print(f"notice: {show_path(path)}: no lock here ({error.strerror}); start one process at a time")
            if _is_open_at(fd, path):  # else the one who had it deleted the file: try with the new one
                self._fd = fd
            else:
                os.close(fd)
        _held.add(self)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        with suppress(OSError):  # on a full disk the lock holds all the same
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(about).encode(), 0)

    def release(self) -> None:
        if self._fd is not None:
            self.path.unlink(missing_ok=True)  # while the lock is held: nobody else's file
            self._close()

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = None
        _held.discard(self)


_held: set[FileLock] = set()


def _let_go_in_child() -> None:
    # A forked worker shares the lock. If it outlives a killed parent, the lock would outlive it too.
    for lock in list(_held):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _holder(fd: int) -> str:
    try:
        about = json.loads(os.pread(fd, 1000, 0))
        return f"process {about['pid']} is writing on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock
        return "it has just begun"


def _is_open_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
