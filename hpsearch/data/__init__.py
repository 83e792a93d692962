"""Data sets as tensors in memory, image files as pixels.

sets          the built-in data sets: what is known of each, and how it is downloaded and read
dataset       splits and batches
augment       randomly shifts, rotates and scales a batch
image_files   converts image files of any size and color, and handwriting, to a network's input
"""
