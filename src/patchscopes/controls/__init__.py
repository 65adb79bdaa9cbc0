"""Whether a reading can be believed: what stands in for a vector, and the evidence of a text about its source."""
