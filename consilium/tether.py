"""Ties a program to the life of its parent: `python -m consilium.tether PARENT_PID PROGRAM ARGUMENTS…`.

On Linux the kernel kills the program when its parent ends, however it ends. The tie is made here, in a fresh process
that then becomes the program: between fork and exec of a parent with threads almost nothing may be done.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent and become the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it ended before the tie was made
            sys.exit(f"error: the process {parent} that started this one has ended")
    os.execvp(program[0], program)


if __name__ == "__main__":
    main()
