"""The processes that run trials, on this machine or in a Ray cluster.

shutdown     turns signals into a request to stop, checked between batches
worker       one worker: asks for trials, sends heartbeats, trains, tells results
forkserver   the process that workers are forked from
processes    workers on this machine and their supervisor
ray          workers in a Ray cluster
"""
