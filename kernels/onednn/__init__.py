"""Dense products with oneDNN's prepacked weights: the rival to beat, and what runs where dense wins."""
