"""Metrics over HTTP, for Prometheus: `http://ADDRESS:PORT/metrics`.

Layer: L5.

- Whoever can connect may read. The address is 127.0.0.1 unless another one is given: names of
  namespaces are in the answer.
- An answer is made at the moment it is asked for; between two scrapes nothing is done.
- One thread per connection; one that says nothing is closed after `IDLE_TIMEOUT_S`.
"""

import errno
import logging
import socket
import sys
import threading
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from prometheus_client import ProcessCollector
from prometheus_client.exposition import MetricsHandler

from kvfs.errors import BusyError, ClosedError, RefusedError, UnavailableError, UsageError
from kvfs.exposition import registry_of
from kvfs.pool import Pool

DEFAULT_HOST: Final = "127.0.0.1"
IDLE_TIMEOUT_S: Final = 10.0
_log = logging.getLogger("kvfs.metrics")


class Address(NamedTuple):
    """Where to listen. Port 0: any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Parse `[ADDRESS:]PORT`; an IPv6 address stands in brackets.

    Raises:
        UsageError: It is no such thing.
    """
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if separator else DEFAULT_HOST
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(
            f"metrics address not understood: {text!r}: expected PORT or ADDRESS:PORT, such as "
            "9105 or 0.0.0.0:9105"
        )
    return Address(host, int(port))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what failed; a scraper that goes away is no failure."""
        del request
        is_expected = isinstance(sys.exception(), OSError | ClosedError)
        level = logging.DEBUG if is_expected else logging.WARNING
        _log.log(level, "scrape failed: %s", client_address, exc_info=True)


class Exporter:
    """Answers scrapes of a pool until closed. Use as a context manager.

    Attributes:
        address: Where it listens.
    """

    def __init__(self, pool: Pool, address: Address) -> None:
        """Listen.

        Args:
            pool: Open; stays open until `close` has returned.
            address: Where.

        Raises:
            BusyError: The address is taken.
            RefusedError: This user may not listen there.
            UnavailableError: There is no such address.
        """
        registry = registry_of(pool)
        ProcessCollector(registry=registry)
        handler: Any = type("Handler", (MetricsHandler,), {
            "registry": registry, "timeout": IDLE_TIMEOUT_S,
        })  # fmt: skip
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        kind = type("Server", (_Server,), {"address_family": family})
        try:
            self._server: ThreadingHTTPServer = kind(address, handler)
        except OSError as error:
            raise _not_listening(address, error) from error
        self.address = Address(*self._server.server_address[:2])
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="kvfs-metrics", daemon=True
        )
        self._thread.start()
        _log.info("metrics: http://%s/metrics", self.address, extra={"address": str(self.address)})

    def close(self) -> None:
        """Listen no more; idempotent."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def _not_listening(address: Address, error: OSError) -> Exception:
    text = f"metrics cannot be served: {address}: {error.strerror or error}; "
    if error.errno == errno.EADDRINUSE:
        return BusyError(text + "give another port with --metrics")
    if error.errno in (errno.EACCES, errno.EPERM):
        return RefusedError(text + "give a port from 1024 up with --metrics")
    return UnavailableError(text + "give an address of this host with --metrics")
