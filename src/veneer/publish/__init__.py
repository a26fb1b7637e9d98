"""Publishing: store paths become an ordinary Nix binary cache whose NARs can be read in parts.

``plan`` says what has to be uploaded and in which order (pure), ``encode`` makes a NAR into zstd frames, ``target`` is
the place, ``upload`` carries the plan out, ``contents`` are where the bytes come from.
"""
