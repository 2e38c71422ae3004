"""`python -m bsa_compile`: the command line."""

from __future__ import annotations

from bsa_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
