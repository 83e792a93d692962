"""From the best trial to a verified model folder.

evaluation   accuracy, confusion matrix, calibration, misclassified images
figures      plots of an evaluation as PNG files
trainings    trains several networks at once, in processes of this machine
confirm      retrains the best trials with new seeds: was it luck?
replay       re-runs a trial with its seed
manifest     replaces a folder in one step; reads a file only if it has not changed
formats      writes the model files, and verifies each in a new process
config       what a model folder says of its network and its images
graph        runs the network of a `model.pt2` without running code from it
likeness     how unlike the training images an image is
bundle       saves and loads the model folder; `Classifier`
retrain      retrains the winner, tests it once, saves it
predict      predictions for image files
"""
