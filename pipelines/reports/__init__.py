"""The comparison and its page, sweeps over turning points, and the paper's tables with ours."""
