"""What was fetched and verified, kept on disk: an SQLite index, NAR files, tree indexes.

Written by one store daemon, read by any number of mount servers. ``cache.Cache`` is the way in.
"""
