"""``python -m veneer.store.listing_child NUMBER GENERATION NAR_HASH NAR_SIZE``: a listing in, its tree index out.

Standard input: the listing's JSON. Standard output: a file, which gets the encoded tree. Standard error: why there is none.
The numbers are decimal, generation and hash hexadecimal. Exit status 0, or 1 for a listing that is refused.

A process of its own, because a big listing takes ten times its size in memory, which an allocator does not give back.
"""

from __future__ import annotations

import os
import signal
import sys

from veneer.formats.listing import parse_listing
from veneer.formats.tree_index import encode_tree
from veneer.model.errors import FormatError

SECONDS = 60
"""Of real time, for one listing; a starter that is gone ends it by then too."""


def main() -> int:
    signal.alarm(SECONDS)
    number, generation, nar_hash, nar_size = sys.argv[1:]
    try:
        node = parse_listing(sys.stdin.buffer.read(), nar_size=int(nar_size))
        encoded = encode_tree(
            node,
            path_number=int(number),
            generation=bytes.fromhex(generation),
            nar_hash=bytes.fromhex(nar_hash),
            nar_size=int(nar_size),
        )
        rest = memoryview(encoded)
        while rest:
            rest = rest[os.write(sys.stdout.fileno(), rest) :]
    except FormatError as error:
        sys.stderr.write(error.story())
        return 1
    except (OSError, MemoryError) as error:
        sys.stderr.write(f"the listing cannot be worked on: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
