"""The parametrization: roles, rules and the one table of every parameter."""
