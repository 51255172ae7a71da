"""The solvers: from sums to steps, as ask and tell; nothing here knows where the sums come from."""
