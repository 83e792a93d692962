"""The study file and the search space.

urls         parses database and artifact URLs, and hides their passwords
space        hyperparameters, the search space, and `suggest`, which samples one from the other
validation   the errors in a study file, with their location
definition   the study file as a frozen `StudyDefinition`
"""
