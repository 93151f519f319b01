from .reference import selective_scan  # placeholder while the chunkwise form is written
