"""Data sets as tensors in memory, and image files as pixels.

dataset        splits, batches, and the registry of data sets
mnist          MNIST and its relatives: downloaded, unpacked, parsed
digits         scikit-learn's digits, enlarged to 28x28
stratify       row numbers of two parts with the same share of each class
augment        random shift, rotation and scale of a batch
image_files    image files of any size and colour to the pixels that a network expects
mnist_images   handwriting to MNIST's form: paper removed, strokes thickened, digit centred
"""
