"""What the store daemon answers may be of no use; the readers that waited for it are answered all the same."""

from __future__ import annotations

import errno
from pathlib import Path

from tests.support.stub_daemon import StubDaemon
from tests.unit.mount.test_dispatch import NUMBER, SPEC, Kernel, read_in
from veneer.formats import fuse_wire as wire
from veneer.formats import request_wire
from veneer.formats.request_wire import Kind
from veneer.formats.tree_index import nar_file, node_id


def readme(kernel: Kernel) -> int:
    error, entry = kernel.ask(wire.LOOKUP, node_id(NUMBER, 0), b"readme\0")
    assert error == 0
    return int(wire.ENTRY_OUT.unpack(entry)[0])


def started(directory: Path) -> StubDaemon:
    store = StubDaemon(directory)
    store.add("hello", SPEC, number=NUMBER)
    store.publish_tree(NUMBER)
    store.start()
    return store


def test_an_answer_to_another_question_fails_the_reader_and_leaves_nobody_waiting(tmp_path: Path) -> None:
    store = started(tmp_path)
    absent = (Kind.ABSENT, request_wire.absent_body(1000))
    store.ready = lambda *_: absent  # type: ignore[method-assign]
    kernel = Kernel(tmp_path, miss_seconds=60.0)
    try:
        node = readme(kernel)
        assert kernel.ask(wire.READ, node, read_in(0, 100))[0] == errno.EIO
    finally:
        kernel.close()
        store.stop()


def test_a_file_that_cannot_be_opened_fails_the_reader_and_keeps_the_connection(tmp_path: Path) -> None:
    store = started(tmp_path)
    nar = tmp_path / nar_file(NUMBER)

    def ready(number: int, offset: int, size: int) -> tuple[Kind, bytes]:
        nar.parent.mkdir(parents=True, exist_ok=True)
        nar.symlink_to(nar)  # ELOOP, as a stand-in for EMFILE
        return Kind.READY, request_wire.ready_body(number, 0, store.sizes[number], whole=True)

    usual, store.ready = store.ready, ready  # type: ignore[method-assign]
    kernel = Kernel(tmp_path, miss_seconds=60.0)
    try:
        node = readme(kernel)
        assert kernel.ask(wire.READ, node, read_in(0, 100))[0] == errno.EIO
        nar.unlink()
        store.ready = usual  # type: ignore[method-assign]
        assert kernel.ask(wire.READ, node, read_in(0, 100)) == (0, b"x" * 100)
        assert store.count(Kind.HELLO) == 1
    finally:
        kernel.close()
        store.stop()
