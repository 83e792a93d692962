"""From the best trial to a verified model folder.

evaluation   accuracy, confusion matrix, calibration, misclassified images
figures      the same as PNG files
confirm      the best trials retrained with new seeds: was it luck?
replay       a trial run again from its seed
manifest     a folder replaced in one step, and read only if no file of it has changed
formats      the model files, each verified in a new process
bundle       the model folder: saved, loaded, `Classifier`
retrain      the winner retrained, tested once, saved
predict      predictions for image files
"""
