"""What a budget costs in quality, on any model and text: recovery, fidelity, tasks; and the selectors to compare."""
