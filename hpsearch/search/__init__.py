"""The search loop: what is tried, how it is judged, and which trial is the best.

study         a study created, resumed, or refused because it is another search
trials        trials as users see them: state, reason, row, progress
checkpoints   where a study keeps its checkpoints, and which it still needs
samplers      the sampler and the pruner of a study
pruning       reports to the pruner, and why it ended a trial
objective     a trial to its validation accuracy
selection     the best trial, the confirmed winner, and how often the test set was read
steering      a running search stopped, extended, given values to try
copy          a study copied to another database and another artifact store
"""
