# SPDX-License-Identifier: Apache-2.0
"""Arrays and pictures that explain what a model does."""

from .denoising import plot_denoising
from .divergence import lagged_divergence, overall, plot_lagged_divergence
from .frontier_pictures import plot_frontier
from .similarity import plot_similarity, running_layers
from .solver import SolverMeasurements, joined, measure_solver
from .solver_pictures import plot_movement, plot_residuals, plot_start_distances
from .sweep_pictures import plot_allocations, plot_checkpoints, plot_gammas, plot_latency, plot_plans
from .trajectory import Trajectory, masked_trajectory, sampled_trajectory


__all__ = [
    "SolverMeasurements",
    "Trajectory",
    "joined",
    "lagged_divergence",
    "masked_trajectory",
    "measure_solver",
    "overall",
    "plot_allocations",
    "plot_checkpoints",
    "plot_denoising",
    "plot_frontier",
    "plot_gammas",
    "plot_lagged_divergence",
    "plot_latency",
    "plot_movement",
    "plot_plans",
    "plot_residuals",
    "plot_similarity",
    "plot_start_distances",
    "running_layers",
    "sampled_trajectory",
]
