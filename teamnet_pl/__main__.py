"""``python -m teamnet_pl`` is ``teamnet``."""

from teamnet_pl.cli import main

main()
