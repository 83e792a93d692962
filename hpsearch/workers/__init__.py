"""The processes that run trials, on this machine or in a Ray cluster.

shutdown     turns signals into a request to stop, checked between batches
cores        counts the workers of a study on this machine, which share its cores
worker       one worker: asks for trials, sends heartbeats, trains, tells results
forkserver   the process that workers are forked from
executor     the loop that starts, watches, replaces and stops workers
processes    workers in processes on this machine
run          a search in Python: `hpsearch.run`
ray          workers in a Ray cluster
"""
