"""The passes: one rewrite or analysis per file, named like its function and its line in the
history.
"""
