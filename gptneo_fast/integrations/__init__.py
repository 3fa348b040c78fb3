"""Other libraries' objects served by ours; each file imports its library, and nothing here imports the files."""
