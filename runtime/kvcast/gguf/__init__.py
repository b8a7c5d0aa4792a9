"""What a model's file says, what loading it costs, and whether it can run sparse."""
