"""What users see of a search: status, live table, report, doctor, dashboard.

text        formatting of messages, numbers and durations
trials      the trials and the progress of a study as documents and tables
tables      tables that fit the console: they leave out columns, never digits
status      a snapshot of a running search, and the remaining time
terminal    hides what is typed while something is drawn, and gives the terminal back
progress    the steps of a command: bars with the time left, or lines
live        the live table, or one line per finished trial
plots       the plots of a report
report      a study as one HTML file
doctor      finds problems of a study or this machine, and fixes some
dashboard   Optuna's dashboard behind a token
"""
