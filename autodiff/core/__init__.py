"""Floor 1: how one function is lifted; the only place that knows torch's and optree's insides."""
