"""From hyperparameters and data to a trained network.

kinds        the MLP and the CNN: their hyperparameters, and the layers that they describe
randomness   the global random numbers of torch, NumPy and Python, which networks of the user's may draw
networks     networks: sequences of torch layers, or a module of the user's
optimizers   optimizers and learning rate schedules
gradients    the gradients of a training step, by autograd or in closed form
metrics      accuracy and balanced accuracy, and the confidence interval of the latter
averaging    the averaged weights of a training, which the pruner compares
trainer      the training loop, pulled an epoch at a time
tryout       tries a network of the user's on one batch before a search
run          loads a study's data, and builds a trainer from a seed
devices      CPU cores, GPUs and memory of this machine
"""
