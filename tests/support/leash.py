"""Runs the command that its arguments are, in a session of its own, and ends it when standard input ends.

So a server never outlives the test that wanted it, even if that was killed. SIGTERM is passed on, SIGUSR1 becomes
SIGSTOP for the whole session, and the exit status is the command's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda _number, _frame: child.terminate())
    signal.signal(signal.SIGUSR1, lambda _number, _frame: os.killpg(child.pid, signal.SIGSTOP))
    threading.Thread(target=_follow_caller, args=(child,), daemon=True).start()
    sys.exit(child.wait())


def _follow_caller(child: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    # Its workers too: the child may be too busy to end them.
    os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
