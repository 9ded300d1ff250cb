//! The decoder: weights, activations, forward and backward.
