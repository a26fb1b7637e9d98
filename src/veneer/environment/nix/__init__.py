"""Nix inside an environment: settings, database, versions."""
