"""From hyperparameters and data to a trained network.

networks     the MLP and the CNN, as sequences of torch layers
optimizers   optimizers and learning rate schedules
gradients    the gradients of a training step, by autograd or in closed form
trainer      the training loop, pulled an epoch at a time
run          loads a study's data, and builds a trainer from a seed
devices      CPU cores, GPUs and memory of this machine
"""
