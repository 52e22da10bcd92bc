"""Wire formats and digests. Nothing here opens a socket, a file or a clock."""
