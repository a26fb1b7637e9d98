"""Values that every layer shares. No I/O, no imports from other layers."""
