"""From hyperparameters and data to a trained network.

kinds        the MLP and the CNN: their hyperparameters, and the layers that they describe
networks     networks as sequences of torch layers
optimizers   optimizers and learning rate schedules
gradients    the gradients of a training step, by autograd or in closed form
trainer      the training loop, pulled an epoch at a time
run          loads a study's data, and builds a trainer from a seed
devices      CPU cores, GPUs and memory of this machine
"""
