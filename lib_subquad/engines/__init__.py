"""What computes a chunk of queries: one module an engine, each as `base` describes it, in the order of `order`."""
