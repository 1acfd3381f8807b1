"""Does it pay? Targeted networks against thin and pruned ones of as many multiply-adds: docs/pays.md."""
