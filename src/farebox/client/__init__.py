"""What a buyer or an integrator imports: an HTTP client that pays, and a thin client of the control API.

from farebox.client import PayingClient, Wallet

with PayingClient(Wallet.load_or_create("wallet.json"), max_price="0.01 USDC") as http:
    answer = http.get("https://api.example.com/weather/rome")
    print(answer.json(), receipt_of(answer))
"""

from farebox.client.control import ApiError, Farebox
from farebox.client.passes import BoughtPass
from farebox.client.paying import AsyncPayingClient, OutcomeUnknown, PayingClient, Receipt, receipt_of
from farebox.client.purse import KNOWN_ASSETS, KnownAsset, PaymentDeclined, Purse
from farebox.client.wallet import Wallet

__all__ = [
    "KNOWN_ASSETS",
    "ApiError",
    "AsyncPayingClient",
    "BoughtPass",
    "Farebox",
    "KnownAsset",
    "OutcomeUnknown",
    "PayingClient",
    "PaymentDeclined",
    "Purse",
    "Receipt",
    "Wallet",
    "receipt_of",
]
