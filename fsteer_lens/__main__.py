"""`python -m fsteer_lens` is the command `fsteer-lens`."""

from fsteer_lens.cli import main

raise SystemExit(main())
