"""How sure a number is."""

Z_95 = 1.959964  # standard errors to either side of a value: its normal 95% interval
