"""Around the ranks of a run: their hosts, what becomes of them, and what a batch system or a terminal does to them."""
