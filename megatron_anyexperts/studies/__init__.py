"""Declared experiments: settings times seeds, a ledger of every run, tables with errors over seeds."""
