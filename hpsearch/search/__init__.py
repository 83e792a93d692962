"""The study, its objective, sampler and pruner, and the choice of the best trial.

study       creates, resumes, stops and extends studies, and enqueues trials; refuses one with a different definition
trials      the events of trials, and why a trial ended
priors      values that are likely to be good, and the sampler that draws from them
samplers    builds the sampler of a study
pruning     the pruners, why they prune, and the callback that asks them
objective   the Optuna objective: trains a trial, returns its value
selection   the best trial, and the confirmed winner
draft       a first study file for images of one's own
copy        copies a study to another database and artifact store
"""
