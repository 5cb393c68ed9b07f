"""Selection of sequences and tokens: policies, alpha and the state they share."""
