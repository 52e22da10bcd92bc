"""The sandbox: real signatures of real clients, settled on a ledger of our own that answers as a testnet on the wire."""

from farebox.rails.sandbox.chain import SANDBOX_NETWORK, SANDBOX_USDC, SandboxChain, seller_address

__all__ = ["SANDBOX_NETWORK", "SANDBOX_USDC", "SandboxChain", "seller_address"]
