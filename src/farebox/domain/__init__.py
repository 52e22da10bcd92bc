"""The business as frozen values and pure rules. Nothing here fetches, waits, logs or looks at a clock."""
