"""How a run trains: the loop, its evaluations, its session around them."""
