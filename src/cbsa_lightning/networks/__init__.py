"""Networks in plain torch. They do not depend on Lightning, so inference and export do not need a Trainer."""

from cbsa_lightning.networks.base import Network, NetworkOutput
from cbsa_lightning.networks.cbsa import CBSANetwork

__all__ = ["CBSANetwork", "Network", "NetworkOutput"]
