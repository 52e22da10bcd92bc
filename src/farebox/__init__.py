"""Farebox gets an API paid: an exact fare per call, a prepaid pass, or an account with an invoice."""

__version__ = "0.1.0"
