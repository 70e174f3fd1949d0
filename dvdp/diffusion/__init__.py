"""The method: bands, schedule, process, timesteps, solvers, sampling, randomness, to be read in that order."""
