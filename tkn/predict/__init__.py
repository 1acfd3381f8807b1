"""The command tkn-predict: a plan on image files. It needs no training code."""
