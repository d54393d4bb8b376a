"""From a store to batches: samples, their order, packing, and the share of each rank."""
