"""What the tests of deployments share: waiting for something to be so, without a pause, and free ports."""

import socket
import time


def until(what, patience=30):
    """What `what` returns, once that is true."""
    end = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < end, "it takes too long"
    return found


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
