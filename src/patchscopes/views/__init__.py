"""Results as pictures: for a file (`heatmap`) and for a terminal (`word_map`)."""
