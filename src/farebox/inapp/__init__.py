"""In your own app: the fare is taken before the app hears of a call (docs/inapp.md).

* ``fare``: ``Fare``, the ASGI middleware
* ``questions``: what is asked of a gateway's forward-auth listener, as bytes, sans I/O
* ``listener``: keep-alive connections to that listener
* ``identity``: ``Admission``, who calls, and what the app is told of it
* ``hand_over``: calls that only the gateway can serve go through it

It runs in somebody else's process: it imports nothing of the house but ``base``, and httpx only when it hands over.
"""

from farebox.inapp.fare import Fare
from farebox.inapp.identity import Admission

__all__ = ["Admission", "Fare"]
