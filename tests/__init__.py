"""Veneer's tests. A package only so that ``tests.support`` can be imported; test directories below are not packages."""
