"""What survives: trials, budget, checkpoints, files. The one door to the database.

engine        SQLite and PostgreSQL made safe: locks, transactions, connections
retry         database errors: which pass, how long to retry, what to tell the user
tables        Optuna's tables: trials read, written and counted in few statements
budget        the budget, counted in the transaction that starts a trial
rdb           Optuna's RDBStorage for parallel workers
backup        a SQLite database copied while it is in use
transfer      the rows of a study copied to another database
artifacts     a folder for files, on this machine or in an object store
checkpoints   training states, complete or absent, checked before they are read
"""
