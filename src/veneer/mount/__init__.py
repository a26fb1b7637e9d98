"""The mount server: answers the kernel from published files, asks the store daemon for what is missing.

How Linux behaves here, as far as the code depends on it:

- A process that waits for a page sleeps until we reply or a signal kills it; other signals have to wait. One that waits for
  a LOOKUP is woken by any signal once we have answered its INTERRUPT. So every request is answered whatever happens, and
  a wait for the daemon has a time limit.
- OPEN and OPENDIR answered ENOSYS once are never asked again, and the kernel keeps pages and directory listings over
  opens. The same holds for GETXATTR, LISTXATTR, ACCESS, FLUSH, LSEEK and STATX.
- READs of the read-ahead are "background" requests, of which the kernel sends ``max_background`` at most. Parked ones
  count: a small limit would let one slow download stop every other file.
- A LOOKUP holds its directory's lock, shared, until it is answered, and INVAL_ENTRY takes the same lock exclusively:
  written while a LOOKUP is parked, it blocks, and every later LOOKUP in that directory queues behind it. Therefore absent
  store paths are answered ENOENT, which the kernel does not remember (``trees.Absent`` does), and nothing has to be
  invalidated when one appears; INVAL_ENTRY is left for quarantined paths, from a thread of its own, while no LOOKUP waits.
- A notice about pages (INVAL_INODE) waits for each page whose READ is under way, and no signal ends that sleep: a server
  killed meanwhile stays, and its reader, until the connection is aborted. So such notices are few, and only of paths whose
  parked READs were answered before.
- Node ids are deterministic (path number and entry number), so FORGET needs no bookkeeping.
- What a server read and did not answer is handed out again when its successor asks for that (FUSE_NOTIFY_RESEND, Linux 6.9).
- The mount ends when the last copy of the /dev/fuse descriptor is closed, or by umount; then read(2) says ENODEV.

Layout: ``device`` (the only ctypes) · ``session`` (INIT) · ``dispatch`` (one request in, one reply out) · ``trees`` and
``content`` (published files, open) · ``misses`` (parked requests, the daemon's socket) · ``stories`` (exceptions to errno)
· ``server`` (threads) · ``succession`` (one server after the other).
"""
