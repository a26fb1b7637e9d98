"""Veneer: a whole Nix store at once, loading only what is touched.

The data path, from the kernel down to a binary cache and back:

1. A process opens ``/nix/store/<hash>-<name>/bin/prog``; overlayfs asks its lower layer, our FUSE mount.
2. ``mount`` answers from a tree index (mmapped, in the kernel's own format) and from NAR files in the cache.
3. What is missing becomes a request (``formats.request_wire``) on a unix socket; the kernel's request is parked.
4. ``daemon`` hands the request to ``store``: which path is it (``resolve``), is it trusted (``verify``)?
5. ``sources`` ask binary caches for narinfo, listing and NAR; the first source in order that has it wins.
6. ``store.fetch`` moves each NAR once, however many readers wait, and checks it against the signed hash.
7. ``cache`` renames the verified file into place and remembers it; only the daemon ever writes there.
8. The daemon answers READY; the mount server reads the file and answers the kernel.
9. ``environment`` puts overlayfs, namespaces and the command around all of this; ``cli`` is the user's side.
"""

__version__ = "0.1.0"
