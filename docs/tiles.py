"""Draw docs/tiles.png, the tiles of a row of two samples in isolated mode: python docs/tiles.py"""

from pathlib import Path

from yojo_kernels import Layout

Layout.build([90, 40], [[30, 50, 20], [25, 35]]).plot(Path(__file__).parent / "tiles.png", block_m=16, block_n=16)
