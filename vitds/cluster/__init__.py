"""Around the processes of a run: what a batch system or a terminal does to them."""
