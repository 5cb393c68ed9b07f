"""Operations on tensors: the keep rule, the head, gradients over kept tokens."""
