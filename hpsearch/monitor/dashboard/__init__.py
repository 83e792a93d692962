"""Optuna's dashboard behind a token, served by threads of this process.

notes    what the dashboard says about a study and its trials
auth     who may request what
server   a web application served at an address of this machine
app      Optuna's dashboard with notes and a style sheet
"""
