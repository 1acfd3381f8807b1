"""What the commands share: the command line, configurations held against a schema, files, messages, signals."""
