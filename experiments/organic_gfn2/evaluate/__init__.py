"""How good is a model against GFN2-xTB on molecules that training never saw? One module for each bar of the table."""
