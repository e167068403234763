"""The memory plan: what each block keeps, computes again or moves under a budget, chosen by modelled cost."""
