"""The commands: each parses its arguments, calls one function and prints the answer.

options   the arguments that several commands share
render    answers as tables
app       search: check, run, worker, launch
watch     watch and steer: status, trials, show, stop, extend, enqueue, dashboard
result    the result: confirm, export, replay, report, evaluate, predict
care      upkeep: doctor, backup, copy
"""
