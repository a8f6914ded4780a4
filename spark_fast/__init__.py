"""SparK pre-training for any ConvNet, at the cost of the visible patches alone."""
