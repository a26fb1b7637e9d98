"""Readers that were interrupted while they waited: what is kept of their requests."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

from tests.support.stub_daemon import StubDaemon
from tests.unit.mount.test_dispatch import NUMBER, SPEC, Kernel, read_in
from veneer.formats import fuse_wire as wire
from veneer.formats.request_wire import Kind
from veneer.formats.tree_index import node_id
from veneer.mount.misses import Parked


def kept() -> int:
    gc.collect()
    return sum(isinstance(found, Parked) for found in gc.get_objects())


def started(directory: Path) -> tuple[StubDaemon, Kernel, int]:
    """A daemon that holds back the content of the node."""
    store = StubDaemon(directory)
    store.add("hello", SPEC, number=NUMBER)
    store.publish_tree(NUMBER)
    store.hold(NUMBER)
    store.start()
    kernel = Kernel(directory, miss_seconds=60.0)
    _, entry = kernel.ask(wire.LOOKUP, node_id(NUMBER, 0), b"readme\0")
    return store, kernel, int(wire.ENTRY_OUT.unpack(entry)[0])


def interrupt(kernel: Kernel, node: int) -> None:
    interrupt_sent(kernel, kernel.send(wire.READ, node, read_in(0, 100)))


def interrupt_sent(kernel: Kernel, sent: int) -> None:
    kernel.send(wire.INTERRUPT, 0, wire.INTERRUPT_IN.pack(sent), unique=sent | 1)
    assert kernel.receive() == (sent, errno.EINTR, b"")


def test_nothing_is_kept_of_interrupted_requests_while_their_question_is_open(tmp_path: Path) -> None:
    store, kernel, node = started(tmp_path)
    try:
        kernel.send(wire.READ, node, read_in(0, 100))
        store.wait_for(Kind.CONTENT)  # its question is open from now on
        before = kept()
        for _ in range(50):
            interrupt(kernel, node)
        assert kept() <= before + 1  # a local of the worker thread
    finally:
        kernel.close()
        store.stop()


def test_the_question_of_an_interrupted_request_is_open_for_the_next_one(tmp_path: Path) -> None:
    store, kernel, node = started(tmp_path)
    try:
        first = kernel.send(wire.READ, node, read_in(0, 100))
        store.wait_for(Kind.CONTENT)
        interrupt_sent(kernel, first)
        sent = kernel.send(wire.READ, node, read_in(0, 100))
        interrupt(kernel, node)  # comes after it, so it was parked
        store.publish_nar(NUMBER)
        store.release()
        assert kernel.receive() == (sent, 0, b"x" * 100)
        assert store.count(Kind.CONTENT) == 1
    finally:
        kernel.close()
        store.stop()
