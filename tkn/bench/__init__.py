"""The command tkn-bench: a baseline network and its targeted version timed side by side."""
