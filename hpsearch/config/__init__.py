"""The study file: read, validated, fingerprinted; and the search space that it describes.

urls         database and artifact URLs: parsed, and shown without passwords
space        hyperparameters, search space, and `suggest`, which draws the one from the other
validation   what is wrong with a study file, and where
definition   the study file as one frozen value, `StudyDefinition`
"""
