"""ALiBi on any plain causal kernel: the bias is folded into a few more head dimensions."""
