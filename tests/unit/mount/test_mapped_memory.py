"""How much a mount server takes its maps for: never too little, and not all that it ever mapped."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.stub_daemon import StubDaemon
from tests.unit.mount.test_dispatch import SPEC
from veneer.mount.trees import COUNTED_EVERY, Trees

MOST = 16


def test_what_is_mapped_is_never_taken_for_less_and_soon_not_for_more(tmp_path: Path) -> None:
    store = StubDaemon(tmp_path)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        trees = Trees(fd, max_mapped=MOST)
        for number in range(1, 4 * COUNTED_EVERY):
            store.add(f"path-{number}", SPEC, number=number)
            store.publish_tree(number)
            index = trees.get(number)
            assert index is not None
            mapped = sum(len(each.buffer) for each in trees.mapped.values())
            assert mapped <= trees._mapped_bytes <= mapped + COUNTED_EVERY * len(index.buffer)
    finally:
        os.close(fd)
