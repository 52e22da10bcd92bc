"""The data plane: an HTTP/1.1 reverse proxy that asks a door before it forwards.

* ``server``: the gateway of one process: its catalog, clock and life
* ``client_socket``, ``connection``: a client's connection: as such, and as heads in, answers out, in order
* ``exchange``: one admitted call between a client and an upstream
* ``dispatch``, ``pending_answers``: its request without a connection, its answer that may not go yet
* ``requests``, ``answer_heads``: what the upstream is told, what the client is told
* ``metering``, ``passage``: a call under limits, and one direction of its bytes; ``tunnel``: both directions after a 101
* ``request_body``, ``held_bodies``, ``kept_answers``: a body on its way in; what is held whole, going up and coming down
* ``upstream``: a keep-alive connection to one target; serves other outbound HTTP as well
* ``routing``, ``targets``: which route takes a call, which paths are served at all
* ``heads``, ``fields``, ``bodies``, ``trailers``: HTTP/1.1 read strictly, sans I/O
* ``forwarding``: who called, as the upstream is told
* ``problems``: code → status → problem+json
* ``settings``, ``counters``: every limit and wait; plain integers for the metrics
* ``spool``, ``shipper``: what was admitted and done, on disk and on its way to the database
"""
