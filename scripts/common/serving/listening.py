"""A listening socket, bound before a model is loaded: a port that is taken is told at once."""

import socket

from common.settings import UserError


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """The bound socket and the URL it stands for. Raises UserError where it cannot be bound."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise UserError(f"{host}:{port}: {error.strerror}; fix: another --host or --port") from None
    name = f"[{host}]" if ":" in host else host
    return listener, f"http://{name}:{listener.getsockname()[1]}"
