"""What is trained: two tasks over one loop, and their wiring."""
