"""Who runs trials, and where.

shutdown     signals become a request to stop, checked between two batches
worker       one worker: asks for trials, sends heartbeats, trains, tells results
forkserver   the process that workers are forked from
processes    workers on this machine, supervised
ray          workers in a Ray cluster
"""
