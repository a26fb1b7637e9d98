"""Runs one command in an environment, as the command line does: ``environment_driver.py SPEC.json RESULT.json``.

SPEC holds RunSpec's fields but ``environ`` and ``cwd``, which are this process's own. Exits as the command did.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from veneer.environment import RunSpec, run
from veneer.model.errors import VeneerError


def main() -> int:
    fields = json.loads(Path(sys.argv[1]).read_text())
    for name in ("cache_root", "environments_root"):
        fields[name] = Path(fields[name])
    fields["command"] = tuple(fields["command"])
    cwd = fields.pop("cwd", None) or str(Path.cwd())
    try:
        outcome = run(RunSpec(environ=dict(os.environ), cwd=cwd, **fields))
    except VeneerError as error:
        result: dict[str, Any] = {
            "error": type(error).__name__,
            "what": error.what,
            "where": error.where,
            "hint": error.hint,
        }
        status = 125
    else:
        result = {"status": outcome.status, "signal": outcome.signal, "report": outcome.report}
        status = outcome.status
    Path(sys.argv[2]).write_text(json.dumps(result))
    return status


if __name__ == "__main__":
    sys.exit(main())
