"""Targets for what others write: ELF files, .xz files, overlay store URLs and the kernel's list of mounts."""

from __future__ import annotations

import lzma
import zlib

from tests.support.elf_files import make_elf
from veneer.formats import elf, overlay_store, xz_index
from veneer.formats.overlay_store import OverlayStore
from veneer.model.errors import FormatError

MEMORY = 64 << 20


def run_elf(data: bytes) -> None:
    """Asks only for what is there, and not without end."""
    asking = elf.questions(len(data))
    asked = 0
    try:
        offset, size = next(asking)
        while True:
            asked += 1
            assert 0 <= offset <= offset + size <= len(data)
            assert size <= elf.MAX_SEARCH
            assert asked <= elf.MAX_QUESTIONS
            offset, size = asking.send(data[offset : offset + size])
    except StopIteration as end:
        found: elf.Linked | None = end.value
    if found is None:
        raise FormatError("no program")
    for name in (found.interpreter, *found.needed, *found.search):
        assert b"\0" not in name
        assert len(name) <= elf.MAX_SEARCH
    assert all(found.search)


def run_xz_index(data: bytes) -> None:
    """``data`` is an index without its CRC. That, the footer and the file's size are made right; then it is canonical."""
    index = data + bytes(-len(data) % 4)
    index += zlib.crc32(index).to_bytes(4, "little")
    foot = (len(index) // 4 - 1).to_bytes(4, "little") + b"\0\4"
    end = index + zlib.crc32(foot).to_bytes(4, "little") + foot + b"YZ"
    sizes = xz_index._records(index)
    length = xz_index.HEADER_SIZE + sum(unpadded + -unpadded % 4 for unpadded, _ in sizes) + len(end)
    frames = xz_index.parse_index(end, file_size=length)
    assert frames is not None
    assert xz_index.parse_index(end, file_size=length + 4) is None
    numbers = [len(sizes), *(number for pair in sizes for number in pair)]
    written = b"\0" + b"".join(map(xz_index._number, numbers))
    assert written + bytes(-len(written) % 4) == index[:-4]
    at, offset = xz_index.HEADER_SIZE, 0
    for frame, (unpadded, size) in zip(frames, sizes, strict=True):
        assert (frame.compressed_offset, frame.offset, frame.size) == (at, offset, size)
        at += unpadded + -unpadded % 4
        offset += size


def run_xz_block(data: bytes) -> None:
    """What stands around a block makes it a file, unless the library refuses the block itself."""
    before, after = xz_index.around(data, 100)
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)
    try:
        content = decoder.decompress(before + data + after, 1 << 20)
    except lzma.LZMAError as error:
        raise FormatError("refused") from error
    if decoder.eof:
        assert len(content) == 100
        assert not decoder.unused_data


def run_overlay_url(data: bytes) -> None:
    """A URL, and after a NUL the list of mounts. Whatever they are: an opinion, at once."""
    text, _, mounts = data.decode("utf-8", "surrogateescape").partition("\0")
    url = overlay_store.parse_overlay_url(text)
    overlay_store.is_overlay_url(text)
    real, lower, upper = url.real_store_dir, url.lower_store_dir, url.upper_layer
    overlay_store.mount_fault(mounts, real, lower, upper)
    overlay_store.cover(mounts, real)
    for fault in url.faults:
        assert fault.what
        assert fault.fix
    if url.faults or not url.lower_socket or "=" in text.replace("=", "", 6):
        raise FormatError("not as we write it")
    store = OverlayStore(
        lower_socket=url.lower_socket,
        lower_root=lower.removesuffix(overlay_store.STORE),
        upper_layer=upper,
        root=real.removesuffix(overlay_store.STORE),
        remount_hook=url.remount_hook,
        check_mount=url.check_mount,
        state_dir=url.state_dir,
    )
    again = overlay_store.parse_overlay_url(store.url())
    if (store.real_store_dir, store.lower_store_dir) == (real, lower):
        assert (again.real_store_dir, again.lower_store_dir, again.upper_layer) == (real, lower, upper)
        assert (again.lower_socket, again.state_dir) == (url.lower_socket, url.state_dir)
        assert (again.remount_hook, again.check_mount) == (url.remount_hook, url.check_mount)
    line = f"overlay {real} overlay rw,lowerdir={lower},upperdir={upper},workdir=/w 0 0\n"
    if not set(real + lower + upper) & set("\\^$*+?()[{| \t\n\r,"):
        assert overlay_store.mount_fault(line, real, lower, upper) is None
        assert overlay_store.cover(line, real) is None


_XZ = lzma.compress(b"a" * 100, check=lzma.CHECK_CRC64)
_PLAIN_XZ = lzma.compress(bytes(range(100)), check=lzma.CHECK_NONE)
_STORE = OverlayStore("/run/veneer/nix.sock", "/mnt/lower", "/srv/upper", "/srv/root", "/srv/hook")
_MOUNTS = "overlay /srv/root/nix/store overlay rw,lowerdir=/mnt/lower/nix/store,upperdir=/srv/upper,workdir=/w 0 0\n"


def _block(file: bytes) -> bytes:
    footer = xz_index.parse_footer(file[-xz_index.FOOTER_SIZE :])
    assert footer is not None
    return file[xz_index.HEADER_SIZE : -footer.index_size - xz_index.FOOTER_SIZE]


ELFS = (
    make_elf([b"libz.so.1", b"libc.so.6"], interpreter=b"/lib/ld.so", runpath=b"/a:$ORIGIN/b"),
    make_elf([b"libz.so.1"], bits=32, rpath=b"/lib", file_type=2),
    make_elf(),
)
XZ_INDEXES = (b"\0\1\x10\x64", b"\0\2\x10\x64\xff\xff\x03\0", b"\0\0")
XZ_BLOCKS = (_block(_XZ), _block(_PLAIN_XZ))
OVERLAY_URLS = (
    f"{_STORE.url()}\0{_MOUNTS}".encode(),
    f"{_STORE.url()}&state=%2Fs&check-mount=false\0x /srv/root/nix/store tmpfs rw 0 0\n".encode(),
)
