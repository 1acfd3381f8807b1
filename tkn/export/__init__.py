"""The command tkn-export: a finished run to a plan, checked against its network, with a table of what it brings."""
