"""The passes: one rewrite or analysis per file.

Each file is named like its function and its line in the history.
"""
