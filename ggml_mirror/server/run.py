"""Running the server: the port opens first, the model loads beside it, SIGTERM ends it when the last answer is out."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import uvicorn

from ..errors import ArgumentError, GgmlMirrorError
from .errors import shutting_down
from .front import Front, Keys, with_cors
from .gate import Gate
from .hooks import ServedProxy, create_app
from .log import start_log
from .patience import Patience
from .settings import ServeConfig
from .state import ServerState

log = logging.getLogger("ggml_mirror.server")

_M_ARENA_MAX = -8  # glibc's malloc.h
_GRACE_S = 5  # for requests that were cancelled to be answered


class ListenError(GgmlMirrorError, OSError):
    """The address cannot be listened on."""


def serve(config: ServeConfig, *, verbose: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Running requests are finished; a second signal ends the process at once.

    Raises:
        GgmlMirrorError: the address is taken, or the first model could not be loaded.
    """
    start_log(as_json=config.log_json, verbose=verbose)
    _keep_memory_together()
    with _listening(config) as listeners:
        Run(config, listeners).run()


class Run:
    """One run of the server in this process."""

    def __init__(self, config: ServeConfig, listeners: list[socket.socket]) -> None:
        self.config = config
        self.listeners = listeners
        self.state = ServerState(config)
        self.patience = Patience(config.timeout)
        self.front = Front(self.state, Keys(config.api_keys), config.server.root_path)
        self.proxy: ServedProxy | None = None
        self.failure: BaseException | None = None
        settings = uvicorn.Config(
            with_cors(self.front, config.cors_origins),
            lifespan="off",
            http="h11",  # has limits for headers
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anyone can write X-Forwarded-For
            timeout_graceful_shutdown=None if config.shutdown_timeout is None else config.shutdown_timeout + _GRACE_S,
            ssl_keyfile=config.server.ssl_keyfile,
            ssl_certfile=config.server.ssl_certfile,
        )
        self.server = _Server(settings)

    def run(self) -> None:
        loader = threading.Thread(target=self._load, name="load", daemon=True)
        asyncio.run(self._serve(loader))
        if self.failure is not None:
            raise self.failure
        if loader.is_alive():  # in native code, which nothing can interrupt
            _leave(0)
        self.state.close()
        if self.proxy is not None:
            self.proxy.free()

    async def _serve(self, loader: threading.Thread) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        log.info(f"listening on {self._url()}; loading {self.config.models[0].model}")
        loader.start()
        await self.server.serve(sockets=self.listeners)

    def _url(self) -> str:
        host, port = self.listeners[0].getsockname()[:2]
        return (
            f"{'https' if self.config.server.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        )

    def _stop(self, number: int) -> None:
        if self.state.draining:
            log.warning("second signal: leaving at once")
            _leave(128 + number)
        self.state.draining = True
        running = self.state.turns.waiting + (self.state.turns.running is not None)
        log.info(f"{signal.Signals(number).name}: finishing {running} requests, taking no more")
        self.patience.shorten()
        if self.config.shutdown_timeout is not None:
            cancel = self.state.turns.cancel_all
            asyncio.get_running_loop().call_later(self.config.shutdown_timeout, cancel, shutting_down())
        self.server.should_exit = True

    def _load(self) -> None:
        try:
            app, self.proxy = create_app(
                self.config.server, self.config.models, self.state.loaded, cache_ram=self.config.cache_ram or 0
            )
            self.front.inner = Gate(
                app,
                self.proxy,
                self.state.facts,
                self.state.turns,
                max_body=self.config.max_body,
                patience=self.patience,
            )
            self._announce()
        except BaseException as error:
            self.failure = error
            self.server.should_exit = True

    def _announce(self) -> None:
        card = self.state.card
        assert card is not None and self.proxy is not None
        if card.mirror is None:
            log.info(f"ready: {card.target['name']}, plainly, without drafting: {card.reason}")
        else:
            mirror = "mirror {dtype}, {cap} rows, {bytes} bytes on {device}".format(**card.mirror)
            log.info(f"ready: {card.target['name']}, drafting: {card.reason}; {mirror}")
        others = self.proxy.aliases[1:]
        if others:
            log.info(f"one model is loaded at a time; a request that names {' or '.join(others)} exchanges it")


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals alone: it would raise them once more when it is done, and the exit code would tell of that."""

    def install_signal_handlers(self) -> None:
        pass

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _listening(config: ServeConfig) -> Iterator[list[socket.socket]]:
    """Sockets on all addresses of the host: localhost may have one of each family."""
    host, port = config.server.host, config.server.port
    if not 0 <= port <= 65535:
        raise ArgumentError(f"--port {port}: 0 to 65535 are ports")
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ArgumentError(f"--host {host}: {error.strerror}") from None
    with ExitStack() as stack:
        listeners: list[socket.socket] = []
        refusal: OSError | None = None
        for family, kind, protocol, _, address in found:
            try:
                # asyncio sends at once (TCP_NODELAY) only where the protocol says TCP.
                listener = stack.enter_context(socket.socket(family, kind, protocol))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6 and len(found) > 1:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((address[0], port, *address[2:]))
                listener.listen(2048)
            except OSError as error:
                # A machine may know an address and not have it; one that is taken is an error.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise _refused(host, port, error) from None
                refusal = error
                continue
            listeners.append(listener)
            port = listener.getsockname()[1]  # if it was 0, the same for all
        if not listeners:
            assert refusal is not None
            raise _refused(host, port, refusal)
        if not config.api_keys and not all(_is_loopback(one.getsockname()[0]) for one in listeners):
            _warn(host)
        yield listeners


def _refused(host: str, port: int, error: OSError) -> ListenError:
    return ListenError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port or --host")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _warn(host: str) -> None:
    log.warning("=" * 78)
    log.warning(f"{host} can be reached from other machines and there is no key: everyone there can use this server.")
    log.warning("Set LLAMA_API_KEY or --api-key-file, or listen on 127.0.0.1.")
    log.warning("=" * 78)


def _keep_memory_together() -> None:
    """glibc gives threads memory of their own, and requests wander over threads: ten thousand of them left 10 MiB more behind."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _leave(code: int) -> Any:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
