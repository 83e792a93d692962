"""The commands: each parses its arguments, calls one function and prints the result.

options   arguments shared by several commands
render    results as tables
app       search: check, run, worker, launch
watch     watching and steering: status, trials, show, stop, extend, enqueue, dashboard
result    the result: confirm, export, replay, report, evaluate, predict
care      maintenance: doctor, backup, copy
"""
