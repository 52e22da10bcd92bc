"""The ports of ``app`` made real, one room a thing. Imported only by wiring, and only when configured."""
