"""Table 1 of arXiv 2509.04419: the objectives as printed in their papers, and the gradients derived from them."""
