"""The method: bands, schedule, process, timesteps, solvers, sampling, randomness, philox, to be read in that order."""
