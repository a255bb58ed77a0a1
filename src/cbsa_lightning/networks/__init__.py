"""Networks in pure torch: they know nothing of Lightning, so inference and export need no Trainer."""

from cbsa_lightning.networks.base import Network, NetworkOutput
from cbsa_lightning.networks.cbsa import CBSANetwork

__all__ = ["CBSANetwork", "Network", "NetworkOutput"]
