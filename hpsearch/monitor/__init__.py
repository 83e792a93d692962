"""What a search looks like: for people, in a terminal, a file or a browser.

text        how messages, numbers and durations are printed
trials      the table of trials: columns, order, CSV
status      a snapshot of a running search, and the time that is left
live        the live table, or a line for each finished trial
plots       the plots of a report
report      a study as one HTML file
doctor      what is wrong with a study or this machine, and how to fix it
dashboard   Optuna's dashboard behind a token
"""
