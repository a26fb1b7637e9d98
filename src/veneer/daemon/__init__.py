"""The store daemon: the cache's only writer and the only process that talks to a network.

``compose`` builds the object graph (nothing else does); ``run`` is the process; ``requests`` serves the request protocol
on ``daemon.sock``; ``control`` answers its CONTROL verbs. Start it with ``python -m veneer.daemon``.
"""
