"""Codecs: bytes in, values out, or the reverse. No I/O.

Every module opens with the specification of its format: where it is defined, encoding, grammar, limits, who enforces
what, and which deviations occur in the wild. Whatever the input is, a codec either accepts it or raises
``FormatError`` (``LimitError`` for sizes); ``tests/fuzz`` holds it to that.
"""
