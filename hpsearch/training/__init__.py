"""Hyperparameters and data to a trained network.

networks     the MLP and the CNN, as sequences of torch's layers
optimizers   optimizers and learning rate schedules
gradients    the gradients of a training step, by autograd or written out
trainer      the training loop
run          what a study trains: its data, and a network from a seed
devices      cores, GPUs and memory of this machine
"""
