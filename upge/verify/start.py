"""The script that `processes.Server` starts: it prepares the process, imports `upge.verify.server` and serves a pool.

Server and workers import neither the parent's main program nor torch. If all verifiers are built in, they do not import
`upge` itself either.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import types


def import_server() -> types.ModuleType:
    """Import `upge.verify.server` without upge's own __init__, which loads torch."""
    package = types.ModuleType("upge")
    package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["upge"] = package
    return importlib.import_module("upge.verify.server")


def forget_package() -> None:
    """Remove the bare package again, so that a user's module that imports `upge` gets the real one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "upge"]:
        del sys.modules[name]


def main() -> None:
    """Serve the pool that the first argument describes (`processes.Server`)."""
    # Launchers send these signals to the whole process group. The parent handles them after it has finished its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    setup = json.loads(sys.argv[1])
    sys.path[:] = setup["path"]
    server = import_server()
    if setup["names"] != setup["built_in"]:
        forget_package()
    server.serve(setup)


if __name__ == "__main__":
    main()
