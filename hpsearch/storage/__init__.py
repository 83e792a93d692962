"""What survives: trials, budget, checkpoints, files.

engine        makes SQLite and PostgreSQL safe: locks, transactions, connections
retry         database errors: which are transient, how long to retry, what to show
tables        the SQL statements on studies and trials, and the buffered trial whose rows they write
gains         counts the trials since the last gain beyond chance
budget        checks the budget in the transaction that starts a trial
rdb           Optuna's RDBStorage for parallel workers
backup        backs up a SQLite database while it is in use
transfer      copies the rows of a study to another database
artifacts     a folder for files, local or in an object store
checkpoints   training states: written atomically, verified when read, removed when no longer needed
"""
