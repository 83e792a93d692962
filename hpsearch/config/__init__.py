"""The study file and the search space.

urls         parses database and artifact URLs, and hides their passwords
files        study files by name: here, in studies/, or an example of the package
space        the search space, hyperparameters of training, and `suggest`, which samples a trial's hyperparameters
signature    the hyperparameters of a network of the user's: the keyword arguments of its function
validation   the problems of a search space, and a sentence with its location for each problem of a study file
definition   the study file as a frozen `StudyDefinition`
"""
