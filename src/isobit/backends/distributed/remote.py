"""A stage of a pipeline in another process or on another machine, behind a connection.

A frame of JSON, then one of tensors, both ways; a key that both sides know.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

import numpy as np
from safetensors.numpy import load, save

from isobit.backends.base import Batch, Results, Wanted
from isobit.backends.base.batch import field_values
from isobit.backends.distributed.pipeline import Stage, StageInfo, TracedStages
from isobit.errors import BackendUnavailable, IsobitError, UsageError

_PROTOCOL = 2
"""What is said over a connection, in which form: another number with every change. The first
stages said none."""
_FRAME = 1 << 30  # bytes of a message
_FIELDS = ("tokens", "positions", "sequence", "pages", "logit_rows", "states", "received")
_WANTED = ("logits", "argmax", "top", "given", "hidden", "digests")
_ASKED = "wanted."  # before the names of arrays of what is wanted
_RESULTS = tuple(f.name for f in fields(Results))


class RemoteStage:
    """A stage behind a connection."""

    def __init__(self, connection: Connection, address: str) -> None:
        self._connection, self._address = connection, address
        about = json.loads(self._received())
        if (protocol := about.pop("protocol", "none")) != _PROTOCOL:
            self.close()
            raise BackendUnavailable(
                f"stage {address}: expected protocol {_PROTOCOL}, got {protocol!s:.60}; "
                "start it with the isobit that asks it"
            )
        fused_away = tuple((name, layer) for name, layer in about.pop("fused_away"))
        self.about = StageInfo(**about, fused_away=fused_away)

    def run(
        self, batch: Batch, wanted: Wanted, stages: frozenset[str] | None
    ) -> tuple[Results, TracedStages]:
        """See :class:`Stage`."""
        arrays = {f: getattr(batch, f) for f in _FIELDS if getattr(batch, f) is not None}
        asked = {f: getattr(wanted, f) for f in _WANTED}
        arrays |= {_ASKED + f: x for f, x in asked.items() if isinstance(x, np.ndarray)}
        asked = {f: x for f, x in asked.items() if not isinstance(x, np.ndarray)}
        try:
            head = {"stages": sorted(stages or ()), "wanted": asked}
            self._connection.send_bytes(json.dumps(head).encode())
            self._connection.send_bytes(save(arrays))
        except OSError as error:
            raise self._lost(error) from None
        head = json.loads(self._received())
        if "error" in head:
            raise BackendUnavailable(f"stage {self._address}: {head['error']}")
        tensors = load(self._received())
        shown = {(name, layer): tensors[str(i)] for i, (name, layer) in enumerate(head["shown"])}
        return Results(**{f: tensors[f] for f in _RESULTS if f in tensors}), shown

    def close(self) -> None:
        """See :class:`Stage`."""
        self._connection.close()

    def _received(self) -> bytes:
        try:
            return self._connection.recv_bytes(_FRAME)
        except (EOFError, OSError) as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> BackendUnavailable:
        why = f" ({error})" if str(error) else ""
        return BackendUnavailable(
            f"stage {self._address}: the connection has ended{why}; start it and load again"
        )


def connect(address: str, key: bytes) -> RemoteStage:
    """The stage that listens at HOST:PORT. Raises UsageError, BackendUnavailable."""
    try:
        return RemoteStage(Client(_place(address), authkey=key), address)
    except (OSError, EOFError) as error:
        raise BackendUnavailable(f"stage {address}: cannot connect: {error}") from None
    except AuthenticationError:
        raise BackendUnavailable(f"stage {address}: expected the key of this pipeline") from None


def serve(stage: Stage, address: str, key: bytes, ready: Callable[[str], None]) -> None:
    """Answer whoever connects and knows the key, one after the other, until interrupted.

    ``ready`` gets the address once it listens (port 0 means any). Raises UsageError.
    """
    try:
        listener = Listener(_place(address), authkey=key)
    except OSError as error:
        raise UsageError(f"{address}: cannot listen there: {error.strerror}") from None
    with listener:
        host, port = listener.address
        ready(f"{host}:{port}")
        while True:
            try:
                connection = listener.accept()
            except (OSError, EOFError, AuthenticationError):
                continue  # someone else
            with connection:
                _answer(stage, connection)


def _answer(stage: Stage, connection: Connection) -> None:
    try:
        greeting = {"protocol": _PROTOCOL} | vars(stage.about)
        connection.send_bytes(json.dumps(greeting).encode())
        while True:
            asked = json.loads(connection.recv_bytes(_FRAME))
            arrays = load(connection.recv_bytes(_FRAME))
            more = {f: arrays.pop(_ASKED + f) for f in _WANTED if _ASKED + f in arrays}
            wanted, names = Wanted(**asked["wanted"] | more), frozenset(asked["stages"]) or None
            try:
                results, shown = stage.run(Batch(**arrays), wanted, names)
            except IsobitError as error:
                connection.send_bytes(json.dumps({"error": str(error)}).encode())
                continue
            connection.send_bytes(json.dumps({"shown": list(shown)}).encode())
            found = {f: x for f, x in field_values(results).items() if x is not None}
            found |= {str(i): x for i, x in enumerate(shown.values())}
            connection.send_bytes(save({f: np.ascontiguousarray(x) for f, x in found.items()}))
    except (EOFError, OSError, ValueError, TypeError, KeyError):
        return  # it has gone, or talks of something else


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"address: expected HOST:PORT, got {address!r:.60}")
    return host, int(port)
