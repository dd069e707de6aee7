"""The mathematics: schedule, sampler, densities, reward gradients, learner. Imports torch only."""
