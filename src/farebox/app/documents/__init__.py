"""What people write and what programs send, turned into the values of the domain: every fault at once, with its path.

No store here: what the database knows is passed in (``Surroundings``).
"""

from farebox.app.documents.catalog import (
    Catalog,
    catalog_from_values,
    catalog_values,
    read_catalog,
    write_catalog,
)
from farebox.app.documents.surroundings import Surroundings

__all__ = [
    "Catalog",
    "Surroundings",
    "catalog_from_values",
    "catalog_values",
    "read_catalog",
    "write_catalog",
]
