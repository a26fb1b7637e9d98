"""The user's side: one file per command, and what commands share.

``main`` dispatches and turns errors into exit codes; ``output`` prints (text or JSON); ``config`` finds settings and makes
the view; ``client`` talks to the daemon. A command's module is imported only when that command runs, and imports the
layers below only inside its functions: ``veneer run true`` must not pay for what it does not use.
"""
