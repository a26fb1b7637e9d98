"""What tests and benchmarks stand on: real Nix, nginx, faulty servers, other users.

``debian`` uses the standard library only, because ``./dev`` imports it before anything is installed.
"""
