"""Train from a configuration: `qft.train(qft.TrainConfig(...))`."""
