"""Pictures: ODE solvers, guidance, grids."""
