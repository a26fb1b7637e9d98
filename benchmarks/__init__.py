"""Benchmarks: ``./dev bench NAME`` runs ``benchmarks/NAME.py``. Results go to docs/benchmarks.md by hand."""
