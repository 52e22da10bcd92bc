"""Use cases, one module per activity. Dependencies come in by the constructor; verbs of the business go out."""
