"""Fuzzing: what any bytes may do to the codecs. See `__main__` for the long run and `targets` for what must hold."""
