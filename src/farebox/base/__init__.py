"""Values with no opinion: money, time, ids, errors. Standard library only."""
