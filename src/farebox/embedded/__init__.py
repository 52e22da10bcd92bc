"""PostgreSQL without installing PostgreSQL: for the demo, the sandbox, tests and small live installations."""

from farebox.embedded.postgres import EmbeddedPostgres

__all__ = ["EmbeddedPostgres"]
