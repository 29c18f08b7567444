"""Table 1 of arXiv 2509.04419: the objectives as their papers print them, and the gradients derived from them."""
