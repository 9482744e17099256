"""The interface of sans-IO cores, and the event loop that runs them."""
