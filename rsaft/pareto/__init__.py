"""PG-OT (Pareto Frontier-Guided Optimal Transport): frontiers of several rewards, and transport to them."""

from rsaft.pareto.dominance import dominates, finite_rows, non_dominated
from rsaft.pareto.frontier import FrontierStore
from rsaft.pareto.objective import ParetoTransport
from rsaft.pareto.sinkhorn import sinkhorn

__all__ = ["FrontierStore", "ParetoTransport", "dominates", "finite_rows", "non_dominated", "sinkhorn"]
