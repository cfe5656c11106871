"""`python -m terseformer` and `torchrun -m terseformer` are the command `terse`."""

from terseformer.cli import main

main()
