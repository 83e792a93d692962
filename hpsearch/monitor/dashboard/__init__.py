"""Optuna's dashboard behind a token, served by threads of this process.

notes    Markdown notes about a study and its trials
auth     access control: token, host name, reading only
server   serves a web application on an address of this machine
app      Optuna's dashboard with notes and an additional style sheet
"""
