"""From a store path's name to verified bytes in the cache.

``views`` say which sources and keys a client uses; ``resolve`` turns a name into verified path info; ``closure`` does it
for everything a path refers to; ``fetch`` moves each NAR once and has ``verify`` check it; ``store`` puts these together
for the daemon. Everything here runs on one event loop; NARs are decoded, hashed and written on worker threads.
"""
