"""The data plane: an HTTP/1.1 reverse proxy that asks a door before it forwards.

* ``server``: the gateway of one process: its catalog, clock and life
* ``connection``: a client's connection: heads in, answers out, in order
* ``exchange``: one admitted call between a client and an upstream
* ``passage``: one direction's bytes under limits; ``tunnel``: both directions after a 101
* ``held_bodies``, ``kept_answers``: what is held whole, going up and coming down
* ``upstream``: a keep-alive connection to one target; serves other outbound HTTP as well
* ``routing``, ``targets``: which route takes a call, which paths are served at all
* ``heads``, ``fields``, ``bodies``, ``trailers``: HTTP/1.1 read strictly, sans I/O
* ``forwarding``: who called, as the upstream is told
* ``problems``: code → status → problem+json
* ``settings``, ``counters``: every limit and wait; plain integers for the metrics
* ``spool``, ``shipper``: what was admitted and done, on disk and on its way to the database
"""
