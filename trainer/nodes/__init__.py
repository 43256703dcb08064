"""Several machines that work on one run: node 0 leads, the others take trainings and evaluations from it.

Every machine starts the same command (``docs/machines.md``). They share a file system for the run's folder, and
node 0 keeps the few small messages between them.
"""

from trainer.nodes.cluster import Cluster
from trainer.nodes.following import follow
from trainer.nodes.membership import Membership, find_membership

__all__ = ["Cluster", "Membership", "find_membership", "follow"]
