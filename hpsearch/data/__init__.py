"""Data sets as tensors in memory, image files as pixels.

sets           the built-in data sets: what is known of each, and how it is read
dataset        splits and batches
mnist          downloads, unpacks and parses MNIST and similar data sets
digits         scikit-learn's digits, upscaled to 28x28
augment        randomly shifts, rotates and scales a batch
image_files    converts image files of any size and color to a network's input
mnist_images   converts handwriting to MNIST's format: removes paper, thickens strokes, centers digits
"""
