"""The commands: each parses its arguments, calls one function and prints the result.

options   arguments shared by several commands
parsing   the classes of commands: how they are parsed, and how help is laid out
render    results as tables
images    init --images: looks at images of one's own, and writes a study file for them
app       search: init, check, run, worker, stop
watch     watch: status, trials, add, dashboard
result    result: confirm, export, predict, evaluate, report
care      upkeep: doctor, copy
"""
