"""Balanced subsets of finished shards: fewer of the reports that an archive repeats over and over.

from shards.balance import BalanceSettings, balance
"""

from shards.balance.settings import BalanceResult, BalanceSettings, ClusterSummary
from shards.balance.subset import balance

__all__ = ["BalanceResult", "BalanceSettings", "ClusterSummary", "balance"]
