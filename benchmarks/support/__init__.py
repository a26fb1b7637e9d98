"""What benchmarks share: a large corpus, a slow link, tables. Real Nix and nginx come from ``tests.support``."""
