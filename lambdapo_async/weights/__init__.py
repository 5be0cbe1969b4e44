"""Weight versions: naming, checksums and their way through Redis."""
