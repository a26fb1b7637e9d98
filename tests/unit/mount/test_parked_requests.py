"""More requests than may wait in a mount: those that wait are answered, the next ones fail at once, and then there is room."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.support.stub_daemon import StubDaemon
from tests.unit.mount.test_dispatch import NUMBER, SPEC, Kernel, read_in
from veneer.formats import fuse_wire as wire
from veneer.formats.tree_index import node_id

MOST = 16


@pytest.mark.parametrize(("sent", "refused"), [(MOST - 1, 0), (MOST, 0), (MOST + 1, 1), (3 * MOST, 2 * MOST)])
def test_requests_beyond_the_limit_fail_at_once_and_the_others_are_answered(
    tmp_path: Path, sent: int, refused: int
) -> None:
    store = StubDaemon(tmp_path)
    store.add("hello", SPEC, number=NUMBER)
    store.publish_tree(NUMBER)
    store.hold(NUMBER)
    store.start()
    kernel = Kernel(tmp_path, miss_seconds=60.0, max_parked=MOST)
    try:
        _, entry = kernel.ask(wire.LOOKUP, node_id(NUMBER, 0), b"readme\0")
        node = int(wire.ENTRY_OUT.unpack(entry)[0])
        uniques = [kernel.send(wire.READ, node, read_in(0, 100)) for _ in range(sent)]
        for unique in uniques[sent - refused :]:
            assert kernel.receive() == (unique, errno.EIO, b"")
        store.publish_nar(NUMBER)
        store.release()
        answered = [kernel.receive() for _ in range(sent - refused)]
        assert sorted(unique for unique, _, _ in answered) == uniques[: sent - refused]
        assert {(error, bool(body)) for _, error, body in answered} == {(0, True)}
        assert kernel.ask(wire.READ, node, read_in(0, 100))[0] == 0
    finally:
        kernel.close()
        store.stop()
